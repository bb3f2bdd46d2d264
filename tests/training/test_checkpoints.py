"""Claims about checkpoints: bit-exact, resumable after any death, verified, refused when they do not fit."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ril_jax.errors import InputError
from ril_jax.training.checkpoints import Checkpointer
from ril_jax.training.failed_batch import save_failed_batch
from ril_jax.training.stopping import StopSignal
from ril_jax.training.workdir import claim_folder


def make_state(seed=0):
    key = jax.random.key(seed)
    return {
        "params": {"w": jax.random.normal(key, (33, 17)), "half": jax.random.normal(key, (5, 4), jnp.bfloat16)},
        "opt": (jnp.int32(7), [jnp.arange(4, dtype=jnp.uint8), jnp.zeros((0, 3))]),
        "special": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
        "key": key,
        "keys": jax.random.split(key, 3),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def as_bytes(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert as_bytes(x) == as_bytes(y)


HOST = {"iterator": {"next": 12, "order": [3, 1]}, "rng": {"state": 2**127 + 5}, "x": 0.1, "none": None, "text": "é\n"}


def values(step):
    return jax.random.normal(jax.random.key(step), (64, 64))


def fill(folder, steps=(1, 2, 3), keep=3):
    """Save a state made from the step's number at each step, and return the folder."""
    with Checkpointer(folder, keep=keep, every=1) as checkpointer:
        for step in steps:
            checkpointer.save(step, {"w": values(step)}, {"step": step})
    return folder


SMALL = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}


def data_file(folder, step):
    """The largest file of a checkpoint: array values."""
    return max((p for p in (folder / str(step) / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_every_bit_of_arrays_keys_and_host_state_comes_back(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path / "ck", every=5) as checkpointer:
        assert checkpointer.restore_latest(abstract(state)) is None
        assert not checkpointer.save(4, state, HOST)
        assert checkpointer.save(5, state, HOST)
    with Checkpointer(tmp_path / "ck", every=5) as checkpointer:
        step, arrays, host = checkpointer.restore_latest(abstract(state))
    assert step == 5
    assert host == HOST
    assert_same_bits(arrays, state)
    assert jax.random.uniform(arrays["keys"][1]) == jax.random.uniform(state["keys"][1])


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpointer(tmp_path / "ck") as checkpointer:
        state = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
        checkpointer.save(1, state, {}, force=True)
        for _ in range(3):
            state["w"] = overwrite(state["w"])
        checkpointer.wait()
        restored = checkpointer.restore_latest(abstract(state)).arrays
    np.testing.assert_array_equal(restored["w"], np.arange(2_000_000, dtype=np.float32))


def test_only_the_newest_keep_checkpoints_stay(tmp_path):
    fill(tmp_path, steps=range(1, 6), keep=2)
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.steps() == [4, 5]


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    with Checkpointer(tmp_path, every=2) as checkpointer:
        assert checkpointer.save(2, {"w": jnp.zeros(3)}, {"n": 1})
        assert checkpointer.save(2, {"w": jnp.ones(3)}, {"n": 2}, force=True)
        assert checkpointer.restore_latest({"w": jnp.zeros(3)}).host == {"n": 1}


SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from ril_jax.training.checkpoints import Checkpointer
rows = NamedSharding(jax.make_mesh((4,), ("fsdp",)), P("fsdp", None))
columns = NamedSharding(jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2]), P(None, "tensor"))
value = np.arange(64, dtype=np.float32).reshape(8, 8)
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, {"w": jax.device_put(value, rows)}, {}, force=True)
with Checkpointer(sys.argv[1]) as checkpointer:
    w = checkpointer.restore_latest({"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=columns)}).arrays["w"]
assert w.sharding == columns and len(w.addressable_shards) == 2
np.testing.assert_array_equal(w, value)
"""


def test_a_checkpoint_of_one_mesh_is_read_onto_another(tmp_path):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    words = [sys.executable, "-c", SHARDED, str(tmp_path / "ck")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Without its note of checksums (an older file, a copy) a flipped bit may pass; every other damage may not.
@pytest.mark.parametrize(
    ("damage", "noted"),
    [
        ("truncate", True),
        ("flip", True),
        ("delete", True),
        ("empty host", True),
        ("truncate", False),
        ("delete", False),
        ("empty host", False),
    ],
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_taken(tmp_path, caplog, damage, noted):
    fill(tmp_path)
    path = data_file(tmp_path, 3)
    if not noted:
        (tmp_path / "3" / "integrity.json").unlink()
    if damage == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "delete":
        path.unlink()
    else:
        (tmp_path / "3" / "host" / "metadata").write_text("")
    with Checkpointer(tmp_path, keep=3, every=1) as checkpointer:
        step, arrays, host = checkpointer.restore_latest(SMALL)
        assert (step, host) == (2, {"step": 2})
        assert (arrays["w"] == values(2)).all()
        assert "step 3" in caplog.text
        assert checkpointer.save(3, {"w": jnp.full((64, 64), 9.0)}, {"step": 3})
        checkpointer.wait()
        assert checkpointer.restore_latest(SMALL).step == 3


def test_every_file_of_a_checkpoint_is_covered_by_its_note(tmp_path):
    fill(tmp_path, steps=(1,))
    noted = json.loads((tmp_path / "1" / "integrity.json").read_text())
    written = {
        str(p.relative_to(tmp_path / "1")) for item in ("arrays", "host") for p in (tmp_path / "1" / item).rglob("*")
    }
    assert set(noted) == {name for name in written if (tmp_path / "1" / name).is_file()}
    assert sum(size for size, _ in noted.values()) > 64 * 64 * 3


def test_no_readable_checkpoint_is_an_error_not_a_silent_start_from_nothing(tmp_path):
    fill(tmp_path, steps=(1, 2))
    for step in (1, 2):
        data_file(tmp_path, step).unlink()
    for _ in range(2):  # the next start does not forget it
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(InputError, match="only corrupt-1, corrupt-2"):
            checkpointer.restore_latest(SMALL)


def test_a_bug_while_reading_an_intact_checkpoint_sets_nothing_aside(tmp_path, monkeypatch):
    fill(tmp_path)
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        monkeypatch.setattr(checkpointer, "_read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpointer.restore_latest(SMALL)
        assert checkpointer.steps() == [1, 2, 3]


def test_arrays_that_do_not_fit_are_all_listed_and_the_checkpoint_stays(tmp_path):
    state = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "c": jnp.zeros(1), "key": jax.random.key(0)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, force=True)
        wrong = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4, jnp.bfloat16), "d": jnp.zeros(1), "key": jnp.zeros(2)}
        with pytest.raises(InputError) as caught:
            checkpointer.restore_latest(wrong)
        for words in (
            "a is float32[2, 3] there",
            "b is float32[4] there and bfloat16[4]",
            "lacks d",
            "holds c",
            "key is",
        ):
            assert words in str(caught.value)
        assert checkpointer.restore_latest({"b": jnp.zeros(4)}, partial=True).arrays["b"].shape == (4,)
        assert checkpointer.steps() == [1]


def test_host_state_that_json_would_change_is_refused_by_its_path(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for host, path in (
            ({"a": {"b": (1, 2)}}, "host.a.b"),
            ({"a": [{1: 2}]}, r"host.a\[0\]"),
            ({"n": np.int64(1)}, "host.n"),
        ):
            with pytest.raises(TypeError, match=path):
                checkpointer.save(1, {"w": jnp.zeros(1)}, host, force=True)


KILLED = """
import sys, jax, jax.numpy as jnp
from ril_jax.training.checkpoints import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=2, every=1)
restored = checkpointer.restore_latest({"w": jnp.zeros((600, 700)), "n": jnp.int32(0)})
step = 0
if restored:
    step, arrays, host = restored
    assert host == {"step": step} and int(arrays["n"]) == step, (step, host, arrays["n"])
    assert (arrays["w"] == step).all()
print("start", step, flush=True)
while True:
    step += 1
    checkpointer.save(step, {"w": jnp.full((600, 700), step, jnp.float32), "n": jnp.int32(step)}, {"step": step})
    print("saved", step, flush=True)
"""


def test_a_run_killed_during_its_saves_always_finds_its_last_complete_checkpoint(tmp_path):
    random = np.random.default_rng(0)
    last_complete = 0
    for _ in range(3):
        words = [sys.executable, "-c", KILLED, str(tmp_path / "ck")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            first = process.stdout.readline().split()
            assert first[:1] == ["start"], process.stderr.read()
            # save() of one step waits for the step before it, so that one is complete
            assert int(first[1]) >= last_complete
            for _ in range(2):
                line = process.stdout.readline()
            time.sleep(random.uniform(0, 0.4))
            process.kill()
            lines = [line, *process.stdout.read().splitlines()]
            last_complete = max(int(said.split()[1]) for said in lines if len(said.split()) == 2) - 1
    with Checkpointer(tmp_path / "ck", keep=2, every=1) as checkpointer:
        assert checkpointer.steps()[-1] >= last_complete > 4


FULL = """
import resource, signal, sys, jax, jax.numpy as jnp, numpy as np
from ril_jax.errors import InputError
from ril_jax.training.checkpoints import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=1, every=1)
noise = lambda n: {"w": jax.random.bits(jax.random.key(n), (n,), jnp.uint32)}
checkpointer.save(1, noise(1000), {})
checkpointer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    checkpointer.save(2, noise(1_000_000), {})
    checkpointer.wait()
    print("no error")
except InputError as error:
    print(error)
print(checkpointer.steps())
w = checkpointer.restore_latest({"w": jax.ShapeDtypeStruct((1000,), jnp.uint32)})
print(w.step, bool((w.arrays["w"] == noise(1000)["w"]).all()))
checkpointer.save(3, noise(1000), {})
checkpointer.close()
print(checkpointer.steps())
"""


def test_a_file_system_that_refuses_the_save_gives_one_line_and_keeps_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / "ck"
    done = subprocess.run([sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    message, steps, restored, later = done.stdout.strip().splitlines()
    assert str(folder) in message
    assert "last good checkpoint is step 1" in message
    assert "--workdir" in message
    assert (steps, restored, later) == ("[1]", "1 True", "[3]")
    assert not list(folder.glob("*tmp*"))


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(1000)}, {})
        checkpointer.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
        with pytest.raises(InputError, match=r"no space left.*4 MiB are needed and 1 MiB are free.*step 1"):
            checkpointer.save(2, {"w": jnp.zeros(1 << 20)}, {})
        assert checkpointer.steps() == [1]


def test_an_error_of_the_background_save_reaches_the_next_call(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(10)}, {})
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpointer._manager, "wait_until_finished", full)
            with pytest.raises(InputError, match="no space left"):
                checkpointer.save(2, {"w": jnp.zeros(10)}, {})
        assert checkpointer.save(2, {"w": jnp.zeros(10)}, {})


def test_a_folder_that_cannot_be_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        Checkpointer(tmp_path / "file" / "ck")


def test_a_folder_of_another_config_is_refused_with_the_differing_fields(tmp_path):
    config = {"seed": 1, "ril": {"beta": 0.01, "widths": (1, 2), "name": None}}
    claim_folder(tmp_path, config)
    claim_folder(tmp_path, config)
    changed = {"seed": 1, "ril": {"beta": 0.02, "widths": (1, 2)}, "more": True}
    with pytest.raises(InputError) as caught:
        claim_folder(tmp_path, changed)
    for words in ("ril.beta was 0.01 and is 0.02", "ril.name was null and is absent", "more was absent and is true"):
        assert words in str(caught.value)
    assert "allow_config_change" in str(caught.value)
    assert "widths" not in str(caught.value)
    claim_folder(tmp_path, changed, allow_change=True)
    assert json.loads((tmp_path / "config.json").read_text())["ril"]["beta"] == 0.02
    assert json.loads((tmp_path / "config.0.json").read_text())["ril"]["beta"] == 0.01


def test_checkpointer_refuses_a_folder_of_another_fingerprint(tmp_path):
    Checkpointer(tmp_path, fingerprint={"seed": 1}).close()
    with pytest.raises(InputError, match="seed was 1 and is 2"):
        Checkpointer(tmp_path, fingerprint={"seed": 2})
    Checkpointer(tmp_path, fingerprint={"seed": 2}, allow_config_change=True).close()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_sets_a_flag_and_the_status(number, status):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.should_stop()
        os.kill(os.getpid(), number)
        assert stop.should_stop()
        assert stop.exit_status == status
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_leaves_at_once():
    program = (
        "import os, signal\nfrom ril_jax.training.stopping import StopSignal\n"
        "with StopSignal() as stop:\n"
        "  os.kill(os.getpid(), signal.SIGINT)\n  print('going on', flush=True)\n"
        "  os.kill(os.getpid(), signal.SIGINT)\n  print('too late', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stdout == "going on\n"


def test_a_failed_batch_is_kept_with_its_note(tmp_path):
    arrays = {"tokens": jnp.arange(6).reshape(2, 3), "rewards": [jnp.array([0.5, jnp.nan], jnp.bfloat16)]}
    path = save_failed_batch(tmp_path / "failed", arrays, {"step": 12, "questions": ["q1", "q2"]})
    second = save_failed_batch(tmp_path / "failed", arrays, {"step": 12})
    with np.load(path) as kept:
        np.testing.assert_array_equal(kept["tokens"], [[0, 1, 2], [3, 4, 5]])
        np.testing.assert_array_equal(kept["rewards/0"], np.float32([0.5, np.nan]))
    note = json.loads(path.with_suffix(".json").read_text())
    assert note["questions"] == ["q1", "q2"]
    assert note["dtypes"]["rewards/0"] == "bfloat16"
    assert second != path
