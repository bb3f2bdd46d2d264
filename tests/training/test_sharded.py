"""Claims about many devices: every mesh gives what one device gives, in samples, log-probs, losses and gradients."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
MESHES = {"qwen": ("1,1,1", "2,2,2"), "internvl": ("1,1,1", "2,2,2")}


@pytest.fixture(scope="module", params=["qwen", "internvl"])
def results(request, tmp_path_factory):
    """The arrays of `helpers/sharded.py` on one device and on each mesh of eight; two processes at a time."""
    from helpers import hf_internvl, hf_models

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen":
        hf_models.save_qwen2_5_vl(folder / "model")
    else:  # two devices divide neither its words nor the heads of its tower
        hf_internvl.save_internvl(folder / "model", text={"vocab_size": 301})
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}

    def run(mesh: str) -> dict:
        output = folder / f"{mesh}.npz"
        command = [sys.executable, "-m", "helpers.sharded", str(folder / "model"), mesh, str(output)]
        subprocess.run(command, check=True, env=environment, timeout=600)
        with np.load(output) as arrays:
            return dict(arrays)

    meshes = MESHES[request.param]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(meshes, pool.map(run, meshes), strict=True))


def test_samples_are_the_same_on_every_mesh(results):
    one = results["1,1,1"]
    for mesh, other in results.items():
        for name in ("greedy", "drawn"):
            np.testing.assert_array_equal(other[name], one[name], err_msg=f"{mesh} {name}")
            np.testing.assert_allclose(other[f"{name}_logprobs"], one[f"{name}_logprobs"], atol=2e-5)
    assert len(np.unique(one["drawn"])) > 50


def test_samples_are_the_same_where_weights_are_moved_for_them(results):
    """By the devices alone (a transfer guard stands around it); onto as many of them as the layout says."""
    many = results["2,2,2"]
    for layout, most in (("replicated", 2), ("tensor", 4)):
        np.testing.assert_array_equal(many[layout], results["1,1,1"]["drawn"], err_msg=layout)
        assert many[f"{layout}_parts"].max() == most, layout


def test_losses_and_gradients_are_the_same_on_every_mesh(results):
    one = results["1,1,1"]
    compared = [name for name in one if name.startswith(("score", "entropy", "ril", "sft"))]
    assert len(compared) > 40
    for mesh, other in results.items():
        for name in compared:
            scale = max(np.abs(one[name]).max(), 1e-5)  # a key's bias has no gradient but rounding
            np.testing.assert_allclose(other[name], one[name], atol=2e-4 * scale, err_msg=f"{mesh} {name}")
    assert all(np.abs(one[name]).max() > 0 for name in compared if name.startswith("ril_step/text.layers"))


def test_the_kernel_that_writes_to_pages_does_so_on_every_mesh(results):
    one = results["1,1,1"]
    for mesh, other in results.items():
        np.testing.assert_array_equal(other["pages"], one["pages"], err_msg=mesh)
    assert (one["pages"][:, [2, 5], [3, 7]] != 0).all()
