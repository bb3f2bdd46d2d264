"""Claims about progress lines and timings, on a clock that the tests turn by hand."""

import io
import json

import pytest

from ril_jax.errors import InputError
from ril_jax.progress import Progress, StageTimer, duration, of_bytes


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def test_pauses_spoil_neither_rate_nor_training_time(clock):
    progress = Progress("ril", 100, clock=clock, stream=io.StringIO())
    with progress.pause("compile"):
        clock.now += 50
    for _ in range(5):
        clock.now += 2
        progress.advance(4)
        with progress.pause("checkpoint"):
            clock.now += 1
    assert progress.seconds() == {"training": 10.0, "compile": 50.0, "checkpoint": 5.0}
    assert progress.rate() == 2.0
    # 20 units took 10 s of training and 5 s of checkpoints; 80 are left; compilation does not come again
    assert progress.eta() == 60.0


def test_a_pause_within_a_pause_is_counted_once_and_errors_end_it(clock):
    progress = Progress("ril", 10, clock=clock, stream=io.StringIO())
    with pytest.raises(RuntimeError), progress.pause("evaluation"):  # noqa: PT012
        clock.now += 1
        with progress.pause("compile"):
            clock.now += 2
        clock.now += 4
        raise RuntimeError
    clock.now += 8
    assert progress.seconds() == {"training": 8.0, "evaluation": 5.0, "compile": 2.0}


def test_a_log_gets_plain_lines_every_interval_and_one_at_the_end(clock):
    stream = io.StringIO()
    with Progress("sft", 60, "questions", clock=clock, stream=stream) as progress:
        for _ in range(60):
            clock.now += 1
            progress.advance(1, {"loss": 0.123456})
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "sft   1/60 questions    1%  1.0 questions/s  ETA 59s  loss 0.1235"
    assert [line.split()[1] for line in lines[:-2]] == ["1/60", "11/60", "21/60", "31/60", "41/60", "51/60", "60/60"]
    assert lines[-1] == "sft: 60 questions in 1m00s (training 1m00s), 1.0 questions/s"


def test_bytes_are_shown_as_gigabytes_with_their_rate_and_the_time_left(clock):
    stream = io.StringIO()
    show = of_bytes("load 7b", clock=clock, stream=stream)
    show(0, 16 * 10**9)
    for done in (4, 12, 16):
        clock.now += 12
        show(done * 10**9, 16 * 10**9)
    assert stream.getvalue().splitlines() == [
        "load 7b   0.0/16.0 GB    0%  - GB/s  ETA ?",
        "load 7b   4.0/16.0 GB   25%  3.0 s/GB  ETA 36s",
        "load 7b  12.0/16.0 GB   75%  0.5 GB/s  ETA 8.0s",
        "load 7b  16.0/16.0 GB  100%  2.2 s/GB  ETA 0.0s",
    ]


def test_nothing_is_shown_of_what_takes_seconds(clock):
    stream = io.StringIO()
    show = of_bytes("load tiny", clock=clock, stream=stream)
    show(0, 10**9)
    show(10**9, 10**9)
    assert not stream.getvalue()


def test_a_terminal_line_is_updated_in_place_and_never_wraps(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = Progress("ril", 4, clock=clock, stream=stream)
    for _ in range(3):
        clock.now += 1
        progress.advance(1, {"reward": 0.5, "a/long/name/of/a/metric": 1})
    text = stream.getvalue()
    assert "\n" not in text
    updates = text.split("\r\x1b[K")[1:]
    assert len(updates) == 3
    assert all(len(update) < 40 for update in updates)
    assert updates[-1].startswith("ril  3/4 questions   75%")


def test_a_resumed_stage_counts_its_rate_from_where_it_began(clock):
    progress = Progress("ril", 100, start=80, clock=clock, stream=io.StringIO())
    clock.now += 5
    progress.advance(10)
    assert progress.rate() == 2.0
    assert progress.eta() == 5.0
    assert "90/100" in progress.line()


def test_slow_stages_show_seconds_a_unit(clock):
    progress = Progress("ril", 100, "steps", clock=clock, stream=io.StringIO())
    assert "ETA ?" in progress.line()
    clock.now += 120
    progress.advance(1)
    assert "120.0 s/step" in progress.line()
    assert "ETA 3h18m" in progress.line()


def test_a_disabled_progress_prints_nothing(clock):
    stream = io.StringIO()
    with Progress("ril", 2, clock=clock, stream=stream, enabled=False) as progress:
        progress.advance(2)
        progress.message("hello")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0s"),
        (4.25, "4.2s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599.6, "1h00m"),
        (11100, "3h05m"),
        (187200, "2d04h"),
    ],
)
def test_durations_as_people_say_them(seconds, words):
    assert duration(seconds) == words


def test_stage_times_add_up_over_the_runs_of_a_workdir(tmp_path, clock):
    for _ in range(2):
        timer = StageTimer(tmp_path, clock=clock)
        with timer.stage("sft"):
            clock.now += 30
        with pytest.raises(KeyboardInterrupt), timer.stage("ril"):  # noqa: PT012
            clock.now += 15
            timer.add("ril", parts={"training": 10.0, "checkpoint": 5.0})
            raise KeyboardInterrupt
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert stages["sft"]["seconds"] == 60
    assert stages["ril"] == {"seconds": 30, "parts": {"training": 20, "checkpoint": 10}}
    lines = timer.table().splitlines()
    assert lines[0].split() == ["sft", "1m00s", "67%"]
    assert lines[1].split(maxsplit=3) == ["ril", "30s", "33%", "training 20s, checkpoint 10s"]
    assert lines[2].split() == ["total", "1m30s"]


def test_a_damaged_stage_file_is_named(tmp_path):
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(InputError, match=r"stages\.json"):
        StageTimer(tmp_path)
