"""Hugging Face -> a run's checkpoint -> Hugging Face, for every family: the files hold the same bits."""

import jax
import jax.numpy as jnp
import pytest
import torch
from helpers import hf_internvl, hf_models
from safetensors.torch import load_file

from ril_jax import sharding
from ril_jax.models.hub import load_params, save_params
from ril_jax.models.tensor_files import SafetensorsFolder
from ril_jax.pretrained import make_network
from ril_jax.training.checkpoints import Checkpointer
from ril_jax.training.state import split_frozen

FAMILIES = {
    "Qwen2.5": hf_models.save_qwen2,
    "Qwen2.5-VL": hf_models.save_qwen2_5_vl,
    "InternVL3 with InternViT-300M": hf_internvl.save_internvl,
    "InternVL3 with InternViT-6B": lambda folder, **kwargs: hf_internvl.save_internvl(
        folder, vision=hf_internvl.KIND_6B, **kwargs
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=["tied", "untied"])
def tiny(request, family, tmp_path_factory):
    return FAMILIES[family](tmp_path_factory.mktemp("tiny"), tie=request.param == "tied")


def assert_same_bits(folder, other, *, but=()):
    there, here = (load_file(path / "model.safetensors") for path in (other, folder))
    assert here.keys() == there.keys()
    for key in there:
        assert here[key].dtype == there[key].dtype, key
        assert torch.equal(here[key].view(torch.uint8), there[key].view(torch.uint8)) == (key not in but), key


def kept(tmp_path, arrays):
    """The arrays after a checkpoint of a run has been written, and read by another process's eyes: from disk."""
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, arrays, {}, force=True)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        return checkpointer.restore_latest(abstract).arrays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_untrained_weights_come_back_bit_by_bit(dtype, tiny, tmp_path):
    folder = tiny.folder
    if dtype == "bfloat16":
        folder = tmp_path / "half"
        type(tiny.hf).from_pretrained(tiny.folder, dtype=torch.bfloat16).save_pretrained(folder)
    network = make_network(tiny.config)
    shardings = sharding.param_shardings(network.specs, sharding.make_mesh())
    params = kept(tmp_path, load_params(folder, network, dtype=jnp.dtype(dtype), shardings=shardings))
    save_params(tmp_path / "out", network, params, family=tiny.config.family)
    assert_same_bits(tmp_path / "out", folder)


def test_of_a_run_with_a_frozen_tower_only_the_decoder_differs(tiny, tmp_path):
    """The checkpoint holds the trained parameters alone; the others are those of the folder before."""
    network = make_network(tiny.config)
    trained, frozen = split_frozen(load_params(tiny.folder, network), train_vision=False)
    assert bool(frozen) == (tiny.config.vision is not None)
    trained["text.norm.weight"] = trained["text.norm.weight"] + 1
    rest = SafetensorsFolder(tiny.folder)
    save_params(tmp_path / "out", network, kept(tmp_path, trained), family=tiny.config.family, rest=rest)
    norm = "language_model.model.norm.weight" if tiny.config.family == "internvl" else "model.norm.weight"
    assert_same_bits(tmp_path / "out", tiny.folder, but=[norm])
