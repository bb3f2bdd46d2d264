"""Claims about choosing questions: what is dropped, why, and how likely a response is under a model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.generated import CONFIG, answers, generated_config, run_here, write_questions
from helpers.quick import quick_compilation

import ril_jax
from ril_jax.data import __main__ as command
from ril_jax.data.records import Question, Response, read_dataset, write_dataset
from ril_jax.errors import InputError
from ril_jax.generation import scoring
from ril_jax.generation.scoring import read_scores, response_key

ROOT = Path(ril_jax.__file__).parents[1]


def call(capsys, *words):
    with pytest.raises(SystemExit) as left:
        command.main([str(word) for word in words])
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


def asked(ids, model, text=lambda id_: id_, finish="stop", judge=-1.0, n=1):
    """Questions whose solution is their id, with `n` responses of `text(id)`."""
    return [
        Question(i, f"what is {i}?", (), i, tuple(Response(model, text(i), 4, finish, judge) for _ in range(n)))
        for i in ids
    ]


def listed(folder):
    return {line["id"]: line for line in map(json.loads, (folder / "selection.jsonl").open())}


def test_merge_joins_data_sets_and_says_what_is_missing(tmp_path, capsys):
    write_dataset(tmp_path / "a", asked("xyz", "a"))
    write_dataset(tmp_path / "b", [*asked("x", "b", finish="length"), *asked("yw", "b")])
    inputs = f"--input={tmp_path / 'a'},{tmp_path / 'b'}"
    status, _, err = call(capsys, "merge", inputs, f"--output={tmp_path / 'out'}")
    assert status == 2
    assert "error: b has no response to 1 of the 4 questions: z; finish its collection, or leave" in err
    status, out, _ = call(capsys, "merge", inputs, f"--output={tmp_path / 'out'}", "--missing=drop", "--drop_overlong")
    assert status == 0
    assert "wrote 1 questions with 2 responses (1 of a, 1 of b)" in out
    assert "left out: 1 responses that were cut off\ndropped: 3 questions to which a model gave no response" in out
    assert [r.model for r in answers(tmp_path / "out")["y"].responses] == ["a", "b"]
    status, _, err = call(capsys, "merge", inputs, f"--output={tmp_path / 'out'}", "--missing=skip")
    assert (status, "missing='skip' is not known; use one of refuse, keep, drop" in err) == (2, True)


def test_too_easy_too_hard_and_overlong_questions_are_dropped_and_listed(tmp_path, capsys):
    teacher = [*asked("abcde", "t"), *asked("f", "t", finish="length"), *asked("g", "t")]
    write_dataset(tmp_path / "teacher", teacher)
    right, wrong = (lambda id_: f"<answer>{id_}</answer>"), (lambda id_: "<answer>nothing</answer>")
    always, never = asked("ab", "s", right, n=3), asked("c", "s", wrong, n=3)
    (some,) = asked("d", "s", wrong, n=2)
    some = replace(some, responses=(*some.responses, Response("s", right("d"), 4, "stop")))
    judged = asked("e", "s", wrong, judge=1.0, n=3)  # who graded it had the last word
    judged[0] = replace(judged[0], responses=(*judged[0].responses[:2], Response("s", right("e"), 4, "stop", 0.0)))
    write_dataset(tmp_path / "student", [*judged, some, *never, *always, *asked("f", "s", right)])
    words = [f"--input={tmp_path / 'teacher'}", f"--output={tmp_path / 'out'}", "--drop_overlong"]
    words.append(f"--student={tmp_path / 'student'}")
    status, out, _ = call(capsys, "select", *words)
    assert status == 0
    assert list(answers(tmp_path / "out").values()) == [q for q in teacher if q.id in "de"]
    assert "kept 2 of 7 questions" in out
    for reason in (
        "2 (always right by the student)", "1 (never right by the student)", "1 (a response was cut off)",
        "1 (no responses of the student)",
    ):  # fmt: skip
        assert reason in out
    found = listed(tmp_path / "out")
    assert {id_: line["accuracy"] for id_, line in found.items()} == {
        "a": 1.0, "b": 1.0, "c": 0.0, "d": pytest.approx(1 / 3), "e": pytest.approx(2 / 3), "f": None, "g": None,
    }  # fmt: skip
    assert [id_ for id_, line in found.items() if line["kept"]] == ["d", "e"]
    status, out, _ = call(capsys, "select", *words, "--accuracy=0.5,1", "--overwrite")
    assert status == 0
    assert list(answers(tmp_path / "out")) == ["e"]
    assert "2 (right 0.5 of the time or less)" in out


def test_another_question_under_the_students_id_is_refused(tmp_path, capsys):
    write_dataset(tmp_path / "teacher", asked("a", "t"))
    write_dataset(tmp_path / "student", [replace(asked("a", "s")[0], prompt="another?")])
    status, _, err = call(
        capsys, "select", f"--input={tmp_path / 'teacher'}", f"--student={tmp_path / 'student'}",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert status == 2
    assert "the student was asked another question under the id 'a'" in err
    assert not (tmp_path / "out").exists()


def write_scores(path, dataset, means):
    """Of responses of 4 tokens, whose mean log-probability a token is given by question."""
    lines = [{"checkpoint": "x"}]
    lines += [
        {"id": q.id, "scores": {response_key(r): [4 * means[q.id], 4] for r in q.responses}}
        for q in dataset if q.id in means
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_band_of_the_gap_is_kept(tmp_path, capsys):
    """Gaps 0, 1, .. 8 nats a token, and one question without scores."""
    dataset = asked("abcdefghij", "t", text=lambda id_: f"text {id_}")
    write_dataset(tmp_path / "teacher", dataset)
    student = write_scores(tmp_path / "s.jsonl", dataset, {id_: -1.0 - i for i, id_ in enumerate("abcdefghi")})
    first = write_scores(tmp_path / "t0.jsonl", dataset, dict.fromkeys("abcd", -1.0))
    second = write_scores(tmp_path / "t1.jsonl", dataset, dict.fromkeys("efghij", -1.0))
    words = [f"--input={tmp_path / 'teacher'}", f"--student_scores={student}", f"--teacher_scores={first},{second}"]
    status, out, _ = call(capsys, "select", *words, f"--output={tmp_path / 'numbers'}", "--gap=1.5,6.5")
    assert status == 0
    assert list(answers(tmp_path / "numbers")) == list("cdefg")
    assert "2 (gap below 1.5)" in out
    assert "2 (gap above 6.5)" in out
    assert "1 (not scored by both)" in out
    assert "gap (nats a token), quantiles: 0% 0, 5% 0.4, 25% 2, 50% 4, 75% 6, 95% 7.6, 100% 8" in out
    assert [line["gap"] for line in listed(tmp_path / "numbers").values()] == [*map(pytest.approx, range(9)), None]
    status, out, _ = call(capsys, "select", *words, f"--output={tmp_path / 'shares'}", "--gap=25%,75%", "--count=3")
    assert status == 0
    kept = list(answers(tmp_path / "shares"))
    assert len(kept) == 3
    assert set(kept) < set("cdefg")
    assert "2 (not drawn)" in out
    call(capsys, "select", *words, f"--output={tmp_path / 'again'}", "--gap=25%,75%", "--count=3")
    assert list(answers(tmp_path / "again")) == kept


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "nothing to select by: give --drop_overlong, --student=DIR, --gap=LOW,HIGH or --count=N"),
        (["--gap=1,2"], "--gap needs --student_scores=FILE and --teacher_scores=FILE"),
        (["--gap=1", "--student_scores=a", "--teacher_scores=b"], "--gap=1: write two numbers or shares"),
        (["--gap=1,2", "--student_scores=a", "--teacher_scores=b"], "a does not exist; make it with python -m"),
        (["--student=no", "--accuracy=1,0"], "--accuracy=1,0: the first must be less than the second"),
        (["--student=no"], "no is not a TFDS data set"),
        (["--drop_overlong", "--student=no", "--config=configs/judge_qwen32b.py"], "--config has no reward.judge"),
        (["--count=-1"], "--count=-1: give 1 or more, or 0 for all"),
    ],
)
def test_mistakes_give_one_line(tmp_path, capsys, monkeypatch, words, line):
    monkeypatch.chdir(ROOT)
    write_dataset(tmp_path / "teacher", asked("a", "t"))
    status, out, err = call(capsys, "select", f"--input={tmp_path / 'teacher'}", f"--output={tmp_path / 'o'}", *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1


def test_where_nothing_is_left_nothing_is_written(tmp_path, capsys):
    write_dataset(tmp_path / "teacher", asked("ab", "t", finish="length"))
    words = [f"--input={tmp_path / 'teacher'}", f"--output={tmp_path / 'out'}", "--drop_overlong"]
    status, _, err = call(capsys, "select", *words)
    assert status == 2
    assert "no question is left, and nothing was written: 2 (a response was cut off)" in err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def responses(made_here, tmp_path_factory):
    """Responses of the tiny model, to questions with and without images."""
    made_here.recorder.reset()
    folder = tmp_path_factory.mktemp("responses")
    config = generated_config(made_here.folder, base_url=made_here.url)
    run_here(config, write_questions(folder / "q.jsonl", 7), folder / "out")
    return folder / "out"


def test_scores_are_the_log_probabilities_of_the_loaded_model(made, responses):
    """`ril_jax.load(...).score`, which computes them in one forward pass; the end of a response is a token more."""
    dataset = read_dataset(responses)
    engine, wanted = made.another_engine(), scoring._Wanted(None, 2)
    found = dict(scoring.score_questions(engine, made.model.chat, iter(dataset), wanted, threads=2, notify=pytest.fail))
    engine.close()
    assert set(found) == {q.id for q in dataset}
    with quick_compilation():
        model = ril_jax.load(made.folder, dtype="float32")
        ends = set()
        for question in dataset:
            assert len(found[question.id]) == len({response_key(r) for r in question.responses[:2]})
            content = [*({"type": "image", "image": data} for data in question.images)]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.prompt}]}]
            for response in question.responses[:2]:
                total, count = found[question.id][response_key(response)]
                score = model.score(messages, response.text)
                ended = response.finish_reason == "stop"
                assert count == len(score.token_ids) + ended
                if ended:
                    assert total < np.sum(score.logprobs)
                else:
                    assert total == pytest.approx(np.sum(score.logprobs), abs=1e-4)
                ends.add(ended)
    assert ends == {True, False}


def test_a_response_that_the_model_has_no_room_for_is_left_out(made):
    """The last one of its question, and the only one of another."""
    short, long = Response("t", "three", 1, "stop"), Response("t", "three " * 300, 300, "length")
    dataset = [
        Question("both", "How many?", (), "3", (short, long)),
        Question("none", "How many?", (), "3", (long,)),
        Question("last", "How many are there?", (), "3", (long, short)),
    ]
    engine, told = made.another_engine(), []
    found = dict(
        scoring.score_questions(
            engine, made.model.chat, iter(dataset), scoring._Wanted(None, 0), threads=1, notify=told.append
        )
    )
    engine.close()
    assert {id_: list(scores) for id_, scores in found.items()} == {
        "both": [response_key(short)], "last": [response_key(short)],
    }  # fmt: skip
    assert [line.partition(":")[0] for line in told] == ["both", "none", "last"]
    assert "the engine's context is 128" in told[0]


def test_scoring_goes_on_where_it_was_stopped(made, responses, tmp_path, monkeypatch, capsys):
    """The command, with an engine that is there already: begun, cut off in the middle of a line, and gone on with."""
    monkeypatch.setattr(scoring, "load_engine", lambda config, loading: (made.model, made.another_engine()))
    words = [f"--config={CONFIG}:{made.folder}", f"--input={responses}", "--responses=1"]
    path = tmp_path / "scores.jsonl"
    status, out, _ = call(capsys, "score", *words, f"--output={path}")
    assert status == 0
    assert f"scored 7 responses; {path} has those of 7 of 7 questions" in out
    whole = read_scores([path])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    with pytest.raises(InputError, match=r"scores\.jsonl:5 is no line of python -m ril_jax\.data score"):
        read_scores([path])
    status, out, _ = call(capsys, "score", *words, f"--output={path}")
    assert "scored 4 responses" in out
    again = read_scores([path])
    assert again.keys() == whole.keys()
    for id_, scores in whole.items():
        assert again[id_] == {key: (pytest.approx(total, abs=1e-4), n) for key, (total, n) in scores.items()}
    for i in range(2):
        call(capsys, "score", *words, f"--output={tmp_path / f'part{i}.jsonl'}", f"--shard={i}/2")
    assert read_scores([tmp_path / f"part{i}.jsonl" for i in range(2)]).keys() == whole.keys()
    status, _, err = call(capsys, "score", *words, f"--output={path}", "--config.dtype=bfloat16")
    assert status == 2
    assert "holds something else, or scores of another model" in err
