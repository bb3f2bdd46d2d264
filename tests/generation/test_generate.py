"""Claims about `python -m ril_jax.generate`: what it writes, in parts or whole, and that kills do not matter."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import grain
import pytest
import tensorflow_datasets as tfds
from helpers import processes
from helpers.generated import answers, begin, command, generated_config, run_here, write_questions
from helpers.quick import quick_compilation

from ril_jax import generate
from ril_jax.data.importer import read_rows
from ril_jax.data.merge import open_responses
from ril_jax.data.records import read_dataset
from ril_jax.errors import InputError
from ril_jax.generation.engine_source import EngineSource
from ril_jax.generation.folder import JobFolder
from ril_jax.generation.job import run_job

COUNT = 14


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "q.jsonl", COUNT)


@pytest.fixture(scope="module")
def by_engine(made_here, questions, tmp_path_factory):
    """The folder of a job by the local engine that nobody disturbed."""
    output = tmp_path_factory.mktemp("by_engine") / "out"
    with quick_compilation():
        run_here(generated_config(made_here.folder), questions, output)
    return output


@pytest.fixture(scope="module")
def by_endpoint(made_here, questions, tmp_path_factory):
    """The folder of a job by the endpoint that nobody disturbed."""
    made_here.recorder.reset()
    output = tmp_path_factory.mktemp("by_endpoint") / "out"
    run_here(generated_config(made_here.folder, base_url=made_here.url), questions, output)
    return output


def test_tfds_and_grain_read_the_data_set(by_engine, questions):
    """Every field of every record, as the input and the summary have it."""
    source = tfds.builder_from_directory(by_engine).as_data_source("train")
    rows = [json.loads(line) for line in questions.open()]
    by_grain = list(grain.MapDataset.source(source))
    assert len(source) == len(by_grain) == COUNT
    lengths = {}
    for row, record, same in zip(rows, source, by_grain, strict=True):
        assert (record["id"], record["prompt"], record["solution"]) == (
            row["id"].encode(), row["prompt"].encode(), b"yes",
        )  # fmt: skip
        assert json.loads(record["extra"]) == {"kind": row["kind"]}
        shapes = [image.shape for image in record["images"]]
        assert shapes == ([(30 + int(row["id"][1:]), 40, 3)] if "images" in row else [])
        assert same["id"] == record["id"]
        responses = record["responses"]
        assert list(responses["model"]) == [b"tiny"] * 3
        assert len(set(responses["text"])) > 1
        assert set(responses["finish_reason"]) <= {b"stop", b"length"}
        assert list(responses["judge"]) == [-1.0] * 3
        for count, reason in zip(responses["token_count"], responses["finish_reason"], strict=True):
            assert 1 <= count <= 12
            assert count == 12 or reason == b"stop"
            lengths[str(count)] = lengths.get(str(count), 0) + 1
    facts = [json.loads(path.read_text()) for path in sorted(by_engine.glob("shard-*.json"))]
    assert [f["rows"] for f in facts] == [4, 4, 4, 2]
    assert {k: sum(f["lengths"].get(k, 0) for f in facts) for k in lengths} == lengths


@pytest.mark.parametrize("concurrency", [1, 7])
def test_responses_do_not_depend_on_what_else_is_running(made, by_engine, questions, tmp_path, concurrency):
    source = EngineSource(made.another_engine(), made.model.chat, generated_config(made.folder), name="tiny")
    with JobFolder.open(
        tmp_path / "out", {}, name="tiny", num_rows=COUNT, rows_per_shard=5, notify=print
    ) as folder:  # fmt: skip
        run_job(
            folder, lambda wanted: ((r.index, r) for r in read_rows(questions, wanted=wanted)), source,
            concurrency=concurrency, threads=2, enabled=False,
        )  # fmt: skip
        folder.finish()
    source.close()
    assert list(read_dataset(tmp_path / "out")) == list(read_dataset(by_engine))


def test_a_prompt_that_the_engine_has_no_room_for_fails_alone(made, tmp_path):
    questions = write_questions(tmp_path / "q.jsonl", 3, row1={"prompt": "what is it " * 100})
    source = EngineSource(made.another_engine(), made.model.chat, generated_config(made.folder), name="tiny")
    with JobFolder.open(tmp_path / "out", {}, name="t", num_rows=3, rows_per_shard=5, notify=print) as folder:
        run_job(
            folder, lambda wanted: ((r.index, r) for r in read_rows(questions, wanted=wanted)), source,
            concurrency=2, threads=2, enabled=False,
        )  # fmt: skip
        folder.finish()
    source.close()
    assert sorted(answers(tmp_path / "out")) == ["q0", "q2"]
    (failed,) = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").open()]
    assert "the engine's context is 128" in failed["reason"]


def test_parts_of_many_hosts_are_the_whole(made, by_endpoint, tmp_path, capsys):
    """Also where an id stands twice, in the parts of two hosts."""
    questions = write_questions(tmp_path / "q.jsonl", COUNT, row9={"id": "q4"}, row11={"solution": ""})
    config = generated_config(made.folder, base_url=made.url)
    run_here(config, questions, tmp_path / "whole")
    for i in (2, 0):
        run_here(config, questions, tmp_path / "parts", shard=f"{i}/3")
    with pytest.raises(InputError, match="lacks 1 of its 3 parts, such as shard-00001-of-00003; run --shard=1/3"):
        open_responses(tmp_path / "parts")
    run_here(config, questions, tmp_path / "parts", shard="1/3")
    other = tmp_path / "parts" / "shard-00002-of-00003" / "job.json"
    job = other.read_text()
    other.write_text(job.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(InputError, match=r"shard-00002-of-00003 is of another job than .*: seed is 1 and not 0; keep"):
        open_responses(tmp_path / "parts")
    other.write_text(job)
    parts = {q.id: q for q in open_responses(tmp_path / "parts")}
    assert parts == answers(tmp_path / "whole")
    assert len(parts) == COUNT - 2
    untouched = {id_: q for id_, q in answers(by_endpoint).items() if id_ not in ("q9", "q11")}
    assert parts == untouched
    capsys.readouterr()
    run_here(config, questions, tmp_path / "parts", summary=True)
    together = capsys.readouterr().out
    run_here(config, questions, tmp_path / "whole", summary=True)
    of_whole = capsys.readouterr().out
    assert f"{COUNT - 2} of {COUNT} rows answered" in together
    assert together.splitlines()[0].partition(": ")[2] == of_whole.splitlines()[0].partition(": ")[2]
    assert together.splitlines()[1:-2] == of_whole.splitlines()[1:-2]


@pytest.mark.slow
def test_two_processes_of_one_run_divide_the_questions(made, by_engine, questions, tmp_path):
    """Each with a model on its own device, and no --shard: together the parts are what one host writes."""
    words = command(made.folder, questions, tmp_path / "out")
    with processes.started(tmp_path, words, 2, made.environment()) as group:
        assert group.wait(240) == [0, 0], group.said()
    parts = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert parts == ["shard-00000-of-00002", "shard-00001-of-00002"]
    assert {q.id: q for q in open_responses(tmp_path / "out")} == answers(by_engine)


@pytest.mark.slow
def test_a_signal_to_one_process_of_a_run_ends_all(made, questions, tmp_path):
    """None waits for the part that is not coming, and the same command goes on."""
    made.recorder.answer = lambda body: (429, {"error": {"message": "busy"}}) if made.recorder.answered > 4 else None
    words = command(made.folder, questions, tmp_path / "out", f"--config.generate.base_url={made.url}")
    with processes.started(tmp_path / "stopped", words, 2, made.environment()) as group:
        group.until(lambda: made.recorder.answered > 4)
        group.processes[1].send_signal(signal.SIGTERM)
        group.until(lambda: "questions that run have" in group.said()[1])
        made.recorder.answer = lambda body: None
        assert group.wait(60) == [143, 143], group.said()
        assert "error: process 1 is gone: stopped by signal 15" in group.said()[0]
    with processes.started(tmp_path / "again", words, 2, made.environment()) as group:
        assert group.wait(60) == [0, 0], group.said()
    assert len(open_responses(tmp_path / "out")) == COUNT


def test_killed_at_random_moments_a_job_asks_for_nothing_twice(made, by_endpoint, questions, tmp_path):
    """Four times SIGKILL after a random count of answers, in a process of its own, and then on to the end."""
    output, draw, kept = tmp_path / "out", random.Random(11), set()
    words = (made.folder, questions, output, f"--config.generate.base_url={made.url}")
    for round_ in range(5):
        asked_before, answered_before = len(made.recorder.bodies), made.recorder.answered
        process = begin(made.environment(), *words)
        if round_ < 4:
            wanted = answered_before + draw.randint(1, 9)
            while made.recorder.answered < wanted and process.poll() is None:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == (-signal.SIGKILL if round_ < 4 else 0), out
        asked = {str(body["messages"]) for body in made.recorder.bodies[asked_before:]}
        texts = " ".join(asked)
        assert not [id_ for id_ in kept if f"Is {id_[1:]} more" in texts]
        kept = {json.loads(line)["id"] for path in output.glob("journal-*") for line in path.open() if line[-1] == "\n"}
        kept |= {id_ for path in output.glob("shard-*.json") for id_ in json.loads(path.read_text())["ids"]}
        time.sleep(0.1)  # what was in flight when it was killed is answered now
    assert list(read_dataset(output)) == list(read_dataset(by_endpoint))
    assert len(kept) == COUNT


def test_killed_with_the_engine_at_work_it_goes_on_with_the_same_responses(made, by_engine, questions, tmp_path):
    output = tmp_path / "out"
    process = begin(made.environment(), made.folder, questions, output)
    while process.poll() is None and sum(path.read_bytes().count(b"\n") for path in output.glob("journal-*")) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    process = begin(made.environment(), made.folder, questions, output)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert list(read_dataset(output)) == list(read_dataset(by_engine))
    assert f"{COUNT} of {COUNT} rows answered, with {3 * COUNT} responses; 0 rows refused, 0 questions failed" in out
    assert re.search(rf"generate tiny +\d+/{COUNT} questions .* ETA ", out)
    assert re.search(r"cut off: [\d.]+% of responses", out)


OPENED = """
import sys
from ril_jax.generation.folder import JobFolder
with JobFolder.open(sys.argv[1], {}, name="t", num_rows=3, rows_per_shard=5, notify=print):
    before = set(sys.modules)
    from tensorflow_datasets import features
    print([name for name in set(sys.modules) - before if name.startswith("tensorflow_datasets")])
"""


def test_tfds_is_imported_before_questions_are_under_way(tmp_path):
    """Its import swaps Python's own for all threads, and an endpoint's client that imports meanwhile would fail."""
    words = [sys.executable, "-c", OPENED, str(tmp_path / "out")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_finished_job_is_left_alone_and_another_is_refused(made, by_endpoint, questions):
    before = {path.name: path.stat().st_mtime_ns for path in by_endpoint.iterdir() if path.name != "job.lock"}
    run_here(generated_config(made.folder, base_url=made.url), questions, by_endpoint)
    assert made.recorder.bodies == []
    assert {p.name: p.stat().st_mtime_ns for p in by_endpoint.iterdir() if p.name != "job.lock"} == before
    config = generated_config(made.folder, base_url=made.url)
    config.sampling.temperature = 0.5
    with pytest.raises(InputError, match=r"another job: sampling.temperature was 1.0 and is 0.5 now; name another"):
        run_here(config, questions, by_endpoint)


@pytest.mark.parametrize(
    ("fields", "changes", "line"),
    [
        ({"shard": "3/3"}, {}, "--shard=3/3 is no part: write i/n, with i from 0 to n - 1"),
        ({"shard": "20/30"}, {}, "holds no rows for --shard=20/30"),
        ({"input": ""}, {}, "--input=QUESTIONS is missing"),
        ({"input": "none.jsonl"}, {}, "none.jsonl does not exist"),
        ({}, {"num_generations": 0}, "config.generate.num_generations is 0; give 1 or more"),
        ({"checkpoint": ""}, {}, "config.checkpoint is empty; name a Hugging Face folder or a hub id, or an endpoint"),
        ({"summary": True}, {}, "holds no job; name the folder that --output named"),
    ],
)
def test_mistakes_give_one_line(questions, tmp_path, fields, changes, line):
    config = generated_config("none", **changes)
    config.checkpoint = fields.pop("checkpoint", "none")
    given = {
        "input": str(questions),
        "output": str(tmp_path / "out"),
        "split": "train",
        "shard": None,
        "summary": False,
    }
    with pytest.raises(InputError, match=line):
        generate.main(SimpleNamespace(config=config, **given | fields))
