"""Claims about how checkpoints are read and written: in any sharding, in place, and within a bound of host memory."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from ril_jax.models import hub
from ril_jax.models.hub import load_params, save_params
from ril_jax.models.parameters import Network
from ril_jax.models.tensor_files import SafetensorsFolder
from ril_jax.models.vlm import VisionLanguageModel


def network_of(config, **kwargs):
    return Network(lambda: VisionLanguageModel(config, **kwargs))


def assert_same(params, others):
    assert list(params) == list(others)
    for name in params:
        assert params[name].dtype == others[name].dtype
        np.testing.assert_array_equal(params[name], others[name], err_msg=name)


def apart(program, *arguments, **environment):
    """The output of a program in a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what is read is the same, however it gets there ---


def from_file(folder, network, dtype):
    """Parameters put together by safetensors and numpy."""
    tensors = load_file(folder / "model.safetensors")
    return {
        name: (
            np.stack([spec.from_hf(tensors[spec.hf.format(layer=layer)]) for layer in range(spec.shape[0])])
            if spec.stacked
            else spec.from_hf(tensors[spec.hf])
        ).astype(dtype)
        for name, spec in network.specs.items()
    }


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize(
    ("staging", "dtype"),
    [(hub.STAGING, "float32"), (40_000, "bfloat16"), (0, "float32"), (0, "bfloat16"), (0, "float16")],
)
def test_small_and_large_parameters_are_what_the_file_says(staging, where, dtype, tiny_vl, monkeypatch):
    """With `staging` 0 nothing is small: everything goes tensor by tensor, as parameters of gigabytes do."""
    monkeypatch.setattr(hub, "_transposes_here", lambda _: where == "host")
    monkeypatch.setattr(hub, "_BLOCK", 5000)  # several blocks a tensor, and not all of one size
    monkeypatch.setattr(hub, "_TILE", (16, 24))
    network = network_of(tiny_vl.config)
    params = load_params(tiny_vl.folder, network, dtype=jnp.dtype(dtype), staging=staging)
    assert_same(params, from_file(tiny_vl.folder, network, jnp.dtype(dtype)))


def test_parameters_are_those_of_the_devices_that_hold_them_and_can_be_given_away(tiny_vl):
    """Donation, which training does, must not reach the buffer that tensors went through."""
    network = network_of(tiny_vl.config)
    wanted = from_file(tiny_vl.folder, network, np.float32)
    first, second = (load_params(tiny_vl.folder, network, staging=0) for _ in range(2))
    double = jax.jit(lambda params: jax.tree.map(lambda a: a + a, params), donate_argnums=0)
    assert_same(double(first), {name: jnp.asarray(a + a) for name, a in wanted.items()})
    assert_same(second, wanted)


SHARDED = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from ril_jax import sharding
    from ril_jax.models import hub
    from ril_jax.models.config import ModelConfig
    from ril_jax.models.parameters import Network
    from ril_jax.models.tensor_files import SafetensorsFolder
    from ril_jax.models.vlm import VisionLanguageModel

    folder, out = sys.argv[1:]
    config = ModelConfig.from_folder(folder)
    network = Network(lambda: VisionLanguageModel(config))
    whole = hub.load_params(folder, network)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.param_shardings(network.specs, mesh)
    assert sum(not s.is_fully_replicated for s in shardings.values()) > 20
    hub._BLOCK, asked = 3000, []
    read_bytes = SafetensorsFolder.read_bytes
    for here in (True, False):
        hub._transposes_here = lambda _: here
        for staging in (hub.STAGING, 0):
            SafetensorsFolder.read_bytes = lambda self, *args: (asked.append(args[2].nbytes), read_bytes(self, *args))
            params = hub.load_params(folder, network, shardings=shardings, staging=staging)
            SafetensorsFolder.read_bytes = read_bytes
            # Replicas and columns of one row range come from one reading of it.
            assert sum(asked) == sum(a.nbytes for a in whole.values()), (sum(asked), here, staging)
            asked.clear()
            for name, array in params.items():
                assert array.sharding.is_equivalent_to(shardings[name], array.ndim), name
                np.testing.assert_array_equal(array, whole[name], err_msg=name)
    hub.save_params(out, network, params)
    print("the same")
"""


def test_eight_devices_get_their_parts_and_give_them_back(tiny_vl, tmp_path):
    output = apart(SHARDED, tiny_vl.folder, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert output == "the same\n"
    assert_same_tensors(tmp_path, tiny_vl.folder)


TWO = """
    import sys
    import jax

    port, rank, folder, out = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    from ril_jax import sharding
    from ril_jax.models import hub
    from ril_jax.models.config import ModelConfig
    from ril_jax.models.parameters import Network
    from ril_jax.models.tensor_files import SafetensorsFolder
    from ril_jax.models.vlm import VisionLanguageModel

    config = ModelConfig.from_folder(folder)
    network = Network(lambda: VisionLanguageModel(config))
    shardings = sharding.param_shardings(network.specs, sharding.make_mesh(fsdp=2, tensor=2))
    params = hub.load_params(folder, network, shardings=shardings, staging=0)
    assert sum(not p.is_fully_addressable for p in params.values()) > 20
    hub.save_params(out, network, params)
"""


def test_two_processes_read_their_parts_and_write_one_folder(tiny_vl, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: apart(TWO, port, rank, tiny_vl.folder, tmp_path / "out", **flags), (0, 1)))
    assert_same_tensors(tmp_path / "out", tiny_vl.folder)


def assert_same_tensors(folder, other):
    there, here = load_file(other / "model.safetensors"), load_file(folder / "model.safetensors")
    assert there.keys() == here.keys()
    for name in there:
        np.testing.assert_array_equal(here[name], there[name], err_msg=name)


def test_progress_counts_the_bytes_of_the_file(tiny_vl, tmp_path):
    network = network_of(tiny_vl.config)
    tensors = load_file(tiny_vl.folder / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    for act in (
        lambda show: load_params(tiny_vl.folder, network, dtype=jnp.bfloat16, progress=show),
        lambda show: save_params(tmp_path, network, load_params(tiny_vl.folder, network), progress=show),
    ):
        calls = []
        act(lambda *call, calls=calls: calls.append(call))
        assert calls[0] == (0, total)
        assert calls[-1] == (total, total)
        assert len(calls) == 1 + len(tensors)
        assert sorted(calls) == calls


# --- what is written ---


def test_shards_are_of_the_size_asked_for_and_the_index_tells_where_everything_is(tiny_vl, tmp_path):
    network = network_of(tiny_vl.config)
    save_params(tmp_path, network, load_params(tiny_vl.folder, network), max_shard_bytes=100_000)
    there = load_file(tiny_vl.folder / "model.safetensors")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 5
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in there.values())
    found = {}
    for path in files:
        with safe_open(path, "np") as file:  # transformers' own reader
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), path.name)
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= 100_000 or len(tensors) == 1
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, there[name], err_msg=name)
    assert found == index["weight_map"]
    assert found.keys() == there.keys()


def test_parameters_that_were_not_trained_come_from_the_checkpoint_before(tiny_vl, tmp_path):
    network = network_of(tiny_vl.config)
    params = load_params(tiny_vl.folder, network)
    trained = {name: 2 * value for name, value in params.items() if not name.startswith("vision.")}
    save_params(tmp_path, network, trained, dtype=jnp.bfloat16, rest=SafetensorsFolder(tiny_vl.folder))
    wanted = {name: trained.get(name, value).astype(jnp.bfloat16) for name, value in params.items()}
    assert_same(load_params(tmp_path, network, dtype=jnp.bfloat16), wanted)


# --- memory ---

MEMORY = """
    import dataclasses, json, sys
    from pathlib import Path
    import jax, jax.numpy as jnp, ml_dtypes, numpy as np
    from ril_jax.models import hub
    from ril_jax.models.config import ModelConfig
    from ril_jax.models.parameters import Network
    from ril_jax.models.tensor_files import NewTensor, write_folder
    from ril_jax.models.vlm import VisionLanguageModel

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    def highest(act):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        result = act()
        return result, resident("VmHWM") - before

    folder = Path(sys.argv[1])
    config = ModelConfig.qwen2_5("0.5b")
    text = dataclasses.replace(config.text, hidden_size=512, intermediate_size=6144, num_hidden_layers=12,
                               num_attention_heads=8, vocab_size=12288)
    network = Network(lambda: VisionLanguageModel(dataclasses.replace(config, text=text)))
    bf16 = np.dtype(ml_dtypes.bfloat16)
    shapes = {
        spec.hf.format(layer=layer): spec.hf_shape
        for spec in network.specs.values()
        for layer in (range(spec.shape[0]) if spec.stacked else [None])
    }
    tensors = [NewTensor(key, shape, bf16) for key, shape in shapes.items()]
    write_folder(folder, tensors, lambda key: np.ones(shapes[key], bf16), max_shard_bytes=60_000_000)
    # What the first load allocates once: threads, the compiler, the heap.
    hub.load_params(folder, network, dtype=jnp.bfloat16, staging=8 << 20)
    report = {"tensor": max(t.nbytes for t in tensors), "total": sum(t.nbytes for t in tensors)}
    for dtype in (jnp.bfloat16, jnp.float32):
        params, peak = highest(lambda: hub.load_params(folder, network, dtype=dtype, staging=8 << 20))
        report[f"load {jnp.dtype(dtype)}"] = peak - sum(value.nbytes for value in params.values())
        assert all(bool((value == 1).all()) for value in params.values())
        if dtype == jnp.float32:
            _, report["save"] = highest(lambda: hub.save_params(folder / "out", network, params, dtype=bf16))
        del params
    print(json.dumps(report))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the resident size from Linux's /proc")
def test_host_memory_stays_under_the_largest_tensor_and_a_fixed_buffer(tmp_path):
    """Of a checkpoint of 240 MB, whose stacked parameters have 75 MB each and whose largest tensor has 12.6 MB."""
    report = json.loads(apart(MEMORY, tmp_path))
    fixed = 8e6 + 4e6 * hub._THREADS + 16e6  # staging, the threads' blocks, and what heap and interpreter take
    assert report["total"] > 200e6
    assert report["tensor"] < 13e6
    for what in ("load bfloat16", "load float32", "save"):
        assert report[what] < report["tensor"] + fixed, report
