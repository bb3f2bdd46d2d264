"""Claims about a job's loop and its folder: killed at any of its steps, it loses nothing and asks for nothing twice."""

import contextlib
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.generated import answers, content, write_questions

from ril_jax.data.importer import read_rows
from ril_jax.data.records import Response, read_dataset
from ril_jax.errors import InputError
from ril_jax.generation import job
from ril_jax.generation.folder import Finished, JobFolder, read_facts
from ril_jax.generation.job import run_job
from ril_jax.generation.outcomes import Outcome, sample_seed
from ril_jax.generation.summary import summary_of_folder

SHARD = 3


class Source:
    """Answers at once, or after up to `delay` seconds in any order, with what the question's id gives."""

    name = "some"

    def __init__(self, failed=(), delay=0.0, remote=False):
        self.asked, self._failed, self._delay, self.remote = [], failed, delay, remote
        self._pool = ThreadPoolExecutor(4) if delay else None

    def prepare(self, question):
        if question.id in self._failed and self._failed[question.id] == "early":
            raise InputError(f"{question.id} is of no use")
        return question

    def start(self, question, tell):
        self.asked.append(question.id)
        outcome = Outcome(failed="refused") if question.id in self._failed else self.outcome(question.id)
        if self._pool is None:
            tell(outcome)
        else:
            wait = random.Random(question.id).uniform(0, self._delay)
            self._pool.submit(lambda: (time.sleep(wait), tell(outcome)))

    @staticmethod
    def outcome(id_):
        draw = random.Random(id_)
        texts = [f"{id_} {draw.random()} é\n" for _ in range(2)]
        reasons = [draw.choice(["stop", "length"]) for _ in range(2)]
        return Outcome(tuple(Response("some", t, len(t), r) for t, r in zip(texts, reasons, strict=True)), 7)


def do(source, questions, output, *, concurrency=3, fields=None):
    num_rows = sum(1 for _ in read_rows(questions))
    with JobFolder.open(
        output, fields or {"input": "a"}, name="some", num_rows=num_rows, rows_per_shard=SHARD, notify=print
    ) as folder:
        if folder.is_finished:
            return

        def read(wanted):
            return ((row.index, row) for row in read_rows(questions, wanted=wanted))

        if not folder.is_whole:
            run_job(folder, read, source, concurrency=concurrency, threads=2, enabled=False)
        folder.finish()


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(step, monkeypatch):
    """Whatever would change the disk for the `step`th time does not happen, nor does anything after it."""
    steps = [0]

    def count(function):
        def counted(*args, **kwargs):
            steps[0] += 1
            if steps[0] >= step:
                raise Killed
            return function(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "fdatasync"):
            patch.setattr(os, name, count(getattr(os, name)))
        for name in ("unlink", "touch", "mkdir"):
            patch.setattr(Path, name, count(getattr(Path, name)))
        yield steps


def test_killed_before_any_of_its_steps_it_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    questions = write_questions(tmp_path / "q.jsonl", 5, row1={"solution": ""})
    whole = Source(failed={"q4": "late"})
    do(whole, questions, tmp_path / "whole")
    expected, facts = answers(tmp_path / "whole"), read_facts(tmp_path / "whole")
    assert list(expected) == ["q0", "q2", "q3"]
    assert whole.asked == ["q0", "q2", "q3", "q4"]
    step, alive, recorded = 0, True, set()
    record = JobFolder.record

    def recording(self, row, finished):
        record(self, row, finished)
        recorded.add(finished.id)

    monkeypatch.setattr(JobFolder, "record", recording)
    while alive:
        recorded.clear()
        step, output = step + 1, tmp_path / f"killed-{step}"
        first, second = Source(failed={"q4": "late"}), Source(failed={"q4": "late"})
        with killed_at(step, monkeypatch), contextlib.suppress(Killed):
            do(first, questions, output)
            alive = False
        kept = {line["id"] for path in output.glob("journal-*") for line in map(json.loads, path.open())}
        kept |= {id_ for path in output.glob("shard-*.json") for id_ in json.loads(path.read_text())["ids"]}
        assert recorded <= kept, step
        do(second, questions, output)
        assert not kept & set(second.asked), step
        assert kept | set(second.asked) == {"q0", "q2", "q3", "q4"}, step
        assert answers(output) == expected, step
        assert read_facts(output) == facts, step
        assert sorted(content(output)) == sorted(content(tmp_path / "whole")), step
    assert step > 25


def test_a_journal_cut_anywhere_gives_its_whole_lines(tmp_path):
    def opened():
        return JobFolder.open(tmp_path / "job", {}, name="n", num_rows=9, rows_per_shard=9, notify=lambda line: None)

    with opened() as folder:
        for i in range(4):
            folder.record(i, Finished(f"q{i}", "of it", Source.outcome(f"q{i}")))
    journal = tmp_path / "job" / "journal-00000.jsonl"
    data = journal.read_bytes()
    ends = [i + 1 for i in range(len(data)) if data[i : i + 1] == b"\n"]
    assert len(ends) == 4
    around = {end + d for end in (0, *ends) for d in (-2, -1, 0, 1, 2)}  # and places in between
    for cut in sorted({*around, *range(0, len(data), 11)} & set(range(len(data) + 1))):
        journal.write_bytes(data[:cut])
        with opened() as folder:
            found = folder.read_journal(0)
        whole = sum(end <= cut for end in ends)
        assert [finished.outcome for finished in found.values()] == [Source.outcome(f"q{i}") for i in range(whole)]
        assert journal.read_bytes() == data[: ends[whole - 1] if whole else 0]


def test_outcomes_in_any_order_give_the_rows_in_order(tmp_path):
    questions = write_questions(tmp_path / "q.jsonl", 20)
    do(Source(), questions, tmp_path / "one", concurrency=1)
    do(Source(delay=0.02), questions, tmp_path / "many", concurrency=7)
    assert [q.id for q in read_dataset(tmp_path / "many")] == [f"q{i}" for i in range(20)]
    assert list(read_dataset(tmp_path / "many")) == list(read_dataset(tmp_path / "one"))
    first = read_dataset(tmp_path / "many")[0]
    assert first.images
    assert json.loads(first.extra) == {"kind": 0}
    assert first.responses == Source.outcome("q0").responses


def test_rows_that_cannot_be_asked_are_listed_and_asked_about_once(tmp_path, capsys):
    broken = {"row2": {"solution": None}, "row5": {"id": "q1"}, "row7": {"images": ["none.png"]}}
    questions = write_questions(tmp_path / "q.jsonl", 10, **broken)
    source = Source(failed={"q8": "early", "q9": "late"})
    do(source, questions, tmp_path / "out")
    assert source.asked == ["q0", "q1", "q3", "q4", "q6", "q9"]
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").open()]
    assert [(f["id"], f["refused"]) for f in failed] == [
        ("q2", True), ("q1", True), ("q7", True), ("q8", False), ("q9", False),
    ]  # fmt: skip
    assert "duplicate id" in failed[1]["reason"]
    words = summary_of_folder(tmp_path / "out")
    assert "5 of 10 rows answered, with 10 responses; 3 rows refused, 2 questions failed" in words
    assert "failed q8: q8 is of no use" in words
    do(again := Source(), questions, tmp_path / "out")
    assert again.asked == []


def test_a_shard_of_which_no_row_can_be_used_is_an_empty_file(tmp_path):
    rows = {f"row{i}": {"solution": ""} for i in range(SHARD, 2 * SHARD)}
    do(Source(), write_questions(tmp_path / "q.jsonl", 3 * SHARD, **rows), tmp_path / "out")
    assert [q.id for q in read_dataset(tmp_path / "out")] == ["q0", "q1", "q2", "q6", "q7", "q8"]


def test_where_nothing_is_answered_nothing_is_kept_and_one_line_says_why(tmp_path):
    questions = write_questions(tmp_path / "q.jsonl", 60)
    source = Source(failed={f"q{i}": "late" for i in range(60)})
    with pytest.raises(InputError, match="no question is answered, of the last 32 that were asked; the first, 'q0'"):
        do(source, questions, tmp_path / "out")
    assert not list((tmp_path / "out").glob("journal-*"))
    do(mended := Source(), questions, tmp_path / "out")
    assert len(mended.asked) == 60


def test_failures_before_the_first_answer_are_kept_once_there_is_one(tmp_path):
    questions = write_questions(tmp_path / "q.jsonl", 40)
    source = Source(failed={f"q{i}": "late" for i in range(31)})
    do(source, questions, tmp_path / "out")
    assert len(answers(tmp_path / "out")) == 9
    assert summary_of_folder(tmp_path / "out").count("\nfailed q") == 10


def test_an_endpoint_that_refuses_all_from_some_moment_on_ends_the_job_and_fails_no_question(tmp_path):
    """A key's budget that is used up, say; a local engine's refusals are the questions' own, however many."""
    questions = write_questions(tmp_path / "q.jsonl", 50)
    failed = {"q1": "late"} | {f"q{i}": "late" for i in range(5, 45)}
    with pytest.raises(InputError, match="no question is answered, of the last 32 that were asked; the first, 'q5'"):
        do(Source(failed=failed, remote=True), questions, tmp_path / "remote")
    do(mended := Source(failed={"q1": "late"}, remote=True), questions, tmp_path / "remote")
    assert mended.asked == [f"q{i}" for i in range(5, 50)]
    assert len(answers(tmp_path / "remote")) == 49
    do(Source(failed=failed), questions, tmp_path / "local")
    assert len(answers(tmp_path / "local")) == 9


def test_a_changed_question_is_refused(tmp_path):
    questions = write_questions(tmp_path / "q.jsonl", 5)
    source = Source()
    source.start = lambda question, tell: (
        Source.start(source, question, tell) if question.id != "q4" else tell(ValueError("a bug"))
    )
    with pytest.raises(ValueError, match="a bug"):
        do(source, questions, tmp_path / "out")
    write_questions(tmp_path / "q.jsonl", 5, row3={"prompt": "another"})
    with pytest.raises(InputError, match="question 'q3' has changed since it was asked"):
        do(Source(), questions, tmp_path / "out")


def test_a_folder_is_one_jobs(tmp_path):
    questions = write_questions(tmp_path / "q.jsonl", 2)
    do(Source(), questions, tmp_path / "out")
    with pytest.raises(InputError, match='belongs to another job: input was "a" and is "b" now'):
        do(Source(), questions, tmp_path / "out", fields={"input": "b"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"also holds notes\.txt, and no job began it"):
        do(Source(), questions, tmp_path / "other")
    with (
        JobFolder.open(tmp_path / "held", {}, name="n", num_rows=1, rows_per_shard=1, notify=print),
        pytest.raises(InputError, match=f"is being written by process {os.getpid()} on "),
    ):
        do(Source(), questions, tmp_path / "held")
    (tmp_path / "out" / "shard-00000.json").write_text("{")
    with pytest.raises(InputError, match=r"shard-00000\.json is damaged .*; delete it, and its shard is made again"):
        do(Source(), questions, tmp_path / "out")
    (tmp_path / "out" / "shard-00000.json").unlink()
    do(again := Source(), questions, tmp_path / "out")
    assert again.asked == ["q0", "q1"]


def test_a_signal_lets_running_questions_end_and_asks_no_further(tmp_path, monkeypatch):
    """SIGTERM while three questions wait: those that end in time are kept, the last one is let go."""
    monkeypatch.setattr(job, "_GRACE", 0.5)
    questions = write_questions(tmp_path / "q.jsonl", 9)
    source, told = Source(), {}

    def start(question, tell):
        source.asked.append(question.id)
        told[question.id] = tell
        if len(told) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            for id_ in ("q0", "q2"):
                told[id_](Source.outcome(id_))

    source.start = start
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        do(source, questions, tmp_path / "out")
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert source.asked == ["q0", "q1", "q2"]
    do(again := Source(), questions, tmp_path / "out")
    assert again.asked == ["q1", *(f"q{i}" for i in range(3, 9))]


def test_seeds_of_samples_differ_and_fit_every_endpoint():
    seeds = {sample_seed(seed, f"q{q}", i) for seed in range(3) for q in range(40) for i in range(16)}
    assert len(seeds) == 3 * 40 * 16
    assert all(0 <= seed < 2**31 for seed in seeds)
