"""Claims about metrics and tables of samples: exact, appended, repaired after a kill, rewound on resume."""

import io
import json
import logging
import math
import os
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from ril_jax.errors import InputError
from ril_jax.training.metrics import (
    MetricsWriter,
    Sample,
    SampleResponse,
    SampleTable,
    is_wall_clock,
    metrics_file,
    read_metrics,
)


def plain(workdir, stage="ril"):
    return MetricsWriter(workdir, stage, tensorboard=False)


def rows(workdir, stage="ril"):
    return read_metrics(metrics_file(workdir, stage), wall_clock=False)


def test_scalars_of_every_kind_come_back_exactly(tmp_path):
    values = {
        "reward": 0.1,
        "float32": np.float32(0.1),
        "jax": jnp.float32(1 / 3),
        "half": jnp.bfloat16(0.3),
        "count": np.int64(2**60 + 1),
        "tiny": 5e-324,
        "flag": True,
        "one": np.array([2.5]),
    }
    with plain(tmp_path) as writer:
        writer.write(1, values)
    [row] = rows(tmp_path)
    expected = {name: float(np.asarray(v).reshape(())) for name, v in values.items()} | {"count": 2**60 + 1}
    assert row == {"step": 1, **expected}


def test_wall_clock_fields_can_be_told_apart(tmp_path):
    with plain(tmp_path) as writer:
        writer.write(3, {"reward": 1.0, "step_time": 2.0, "time/judge": 1.0, "tokens_per_second": 9.0})
    [row] = read_metrics(metrics_file(tmp_path, "ril"))
    assert {name for name in row if is_wall_clock(name)} == {
        "step_time",
        "time/judge",
        "tokens_per_second",
        "time/unix",
    }
    assert rows(tmp_path) == [{"step": 3, "reward": 1.0}]


def test_nan_is_written_and_announced_once_a_name(tmp_path, caplog):
    with plain(tmp_path) as writer, caplog.at_level(logging.WARNING):
        writer.write(1, {"kl": float("nan"), "loss": jnp.float32(np.inf), "ok": 1.0})
        writer.write(2, {"kl": float("nan")})
    first = rows(tmp_path)[0]
    assert math.isnan(first["kl"])
    assert first["loss"] == math.inf
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "kl" in messages[0]
    assert "step 1" in messages[0]


def test_an_array_is_refused_by_its_name(tmp_path):
    with plain(tmp_path) as writer, pytest.raises(ValueError, match=r"rewards.*\(3,\)"):
        writer.write(1, {"rewards": np.zeros(3)})


def test_a_killed_and_resumed_run_has_the_metrics_of_an_uninterrupted_one(tmp_path):
    value = lambda step: {"reward": 1 / (step + 3), "kl": step * 0.1}  # noqa: E731
    with plain(tmp_path / "whole") as writer:
        for step in range(1, 11):
            writer.write(step, value(step))
    writer = plain(tmp_path / "killed")
    for step in range(1, 8):
        writer.write(step, value(step))
    os.write(writer._file, b'{"step": 8, "rew')  # what a SIGKILL in the middle of a write leaves
    resumed = plain(tmp_path / "killed")
    resumed.rewind(5)
    for step in range(6, 11):
        resumed.write(step, value(step))
    resumed.close()
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_opening_repairs_a_torn_last_line(tmp_path):
    path = metrics_file(tmp_path, "ril")
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}')
    assert read_metrics(path) == [{"step": 1, "a": 1.0}]
    with plain(tmp_path) as writer:
        writer.write(2, {"a": 3.0})
    assert rows(tmp_path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}]


def test_damage_in_the_middle_is_named_by_file_and_line(tmp_path):
    path = metrics_file(tmp_path, "ril")
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"ril\.jsonl, line 2"):
        plain(tmp_path)


def test_rewind_to_before_the_start_drops_everything_and_going_back_without_it_is_refused(tmp_path):
    with plain(tmp_path) as writer:
        writer.write(4, {"a": 1.0})
        writer.write(4, {"eval/a": 1.0})
        with pytest.raises(ValueError, match="rewind"):
            writer.write(3, {"a": 1.0})
    with plain(tmp_path) as writer:
        with pytest.raises(ValueError, match="rewind"):
            writer.write(3, {"a": 1.0})
        writer.rewind(-1)
        writer.write(0, {"a": 2.0})
    assert rows(tmp_path) == [{"step": 0, "a": 2.0}]


WRITES_FOREVER = """
import sys
from ril_jax.training.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1], "ril", tensorboard=False)
step = 0
while True:
    step += 1
    writer.write(step, {f"metric/{i}": step / 7 for i in range(200)})
    if step == 20:
        print("started", flush=True)
"""


def test_a_process_killed_while_writing_loses_at_most_its_last_line(tmp_path):
    words = [sys.executable, "-c", WRITES_FOREVER, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.kill()
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert len(found) >= 20
    assert all(row["metric/199"] == row["step"] / 7 for row in found)


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    writer = plain(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file)
    with pytest.raises(InputError, match=r"ril\.jsonl: No space left on device"):
        writer.write(1, {"reward": 1.0})
    os.close(full)


def events(folder):
    """(tag, step, value) of every scalar and the steps of every restart, in the order of the files."""
    from tensorboardX.proto import event_pb2

    scalars, restarts = [], []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # a TFRecord: length, its CRC, the event, its CRC
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            if event.HasField("session_log"):
                restarts.append(event.step)
    return scalars, restarts


def test_tensorboard_gets_every_scalar_and_a_restart_mark_after_rewind(tmp_path):
    with MetricsWriter(tmp_path, "ril/both") as writer:
        writer.write(1, {"reward": 0.5})
        writer.write(2, {"reward": 0.25})
    with MetricsWriter(tmp_path, "ril/both") as writer:
        writer.rewind(1)
        writer.write(2, {"reward": 0.75})
    scalars, restarts = events(tmp_path / "tensorboard" / "ril" / "both")
    assert scalars == [("reward", 1, 0.5), ("reward", 2, 0.25), ("reward", 2, 0.75)]
    assert restarts == [2]


def test_wandb_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        MetricsWriter(tmp_path, "ril", tensorboard=False, wandb={"project": "x"})


def test_wandb_gets_the_scalars_and_one_identity_for_a_workdir(tmp_path, monkeypatch):
    calls, started = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **settings: started.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        with MetricsWriter(tmp_path, "ril", tensorboard=False, wandb={"project": "x"}) as writer:
            writer.write(7, {"reward": 0.5})
    assert calls[:2] == [(7, {"ril/reward": 0.5}), "end"]
    assert started[0] == started[1]
    assert started[0]["project"] == "x"


def png(color, size=(8, 6)):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_table_of_samples_holds_texts_rewards_and_each_image_once(tmp_path):
    table = SampleTable(tmp_path, "ril", every=5)
    assert [step for step in range(1, 11) if table.due(step)] == [5, 10]
    responses = [SampleResponse("student", "<b>4</b>\nümlaut", 0.25, 1.0, "right: 4 = 4"), SampleResponse("blunt", "5")]
    gif = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), "blue").save(gif, format="GIF")
    samples = [
        Sample("q1", "How many?", "4", [png("red"), PIL.Image.new("RGB", (3, 3), "green")], responses),
        Sample("q2", "And now?", "5", [png("red"), gif.getvalue()]),
    ]
    path = table.write(5, samples)
    table.write(10, samples)
    assert path == tmp_path / "samples" / "ril" / "step_000005.json"
    first, second = json.loads(path.read_text())["samples"]
    assert first["responses"][0] == {
        "model": "student",
        "text": "<b>4</b>\nümlaut",
        "similarity": 0.25,
        "answer": 1.0,
        "judge": "right: 4 = 4",
        "advantage": None,
    }
    assert first["images"][0] == second["images"][0]
    assert (tmp_path / "samples" / first["images"][0]).read_bytes() == png("red")
    assert len(list((tmp_path / "samples" / "images").iterdir())) == 3
    assert PIL.Image.open(tmp_path / "samples" / second["images"][1]).format == "PNG"


def test_rewinding_samples_deletes_only_later_tables(tmp_path):
    table = SampleTable(tmp_path, "ril", every=1)
    for step in (1, 2, 3):
        table.write(step, [])
    table.rewind(2)
    assert sorted(p.name for p in (tmp_path / "samples" / "ril").iterdir()) == ["step_000001.json", "step_000002.json"]
