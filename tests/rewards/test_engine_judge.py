"""Claims about the judge that is a model in this process."""

import shutil
import threading

import jax
import pytest
from helpers.quick import quick_compilation
from helpers.tiny_folder import build_tiny_folder

import ril_jax
from ril_jax.compilation import CompileCounter
from ril_jax.errors import InputError
from ril_jax.rewards import engine_judge
from ril_jax.rewards.judge import JudgeInterrupted, JudgeItem, make_judge
from ril_jax.rewards.verdict import Verdict, judge_messages

SHAPES = {
    "max_model_len": 1000, "slots": 4, "small_slots": 0, "page_size": 16, "prefill": ((256, 2),), "decode_steps": 4,
    "attention_block": 64,
}  # fmt: skip
ITEMS = [JudgeItem("How many?", "5", f"There are {n} of them.", f"q{n}") for n in range(3, 8)]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_folder(tmp_path_factory.mktemp("judge"), vision=False)


@pytest.fixture
def judge_of(folder):
    def make(checkpoint=folder, **fields):
        arguments = {name: fields.pop(name) for name in ("stop", "counter", "launching") if name in fields}
        config = {"kind": "engine", "checkpoint": str(checkpoint), "dtype": "float32", "max_tokens": 12}
        return make_judge(config | {"engine": SHAPES} | fields, notify=lambda line: None, **arguments)

    return make


def readable(text):
    """In the place of `parse_verdict`: a random model never writes a verdict."""
    return Verdict(float(len(text) % 2), text.strip())


def test_it_is_asked_greedily_with_the_judges_prompt(folder, judge_of):
    verdicts = judge_of()([*ITEMS, JudgeItem("How many?", "5", "...", "q"), ITEMS[0]])
    model = ril_jax.load(folder, dtype="float32")
    texts = [model.generate(judge_messages(item), max_tokens=12)[0].text.strip() for item in ITEMS]
    assert len(set(texts)) > 1
    assert [verdict.explanation for verdict in verdicts] == [*texts, "empty or degenerate response", texts[0]]
    assert all("no <answer>" in verdict.error for verdict in verdicts[:5])


def test_verdicts_are_kept_for_the_checkpoint_wherever_it_lies(judge_of, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_judge, "parse_verdict", readable)
    cache = {"cache_path": str(tmp_path / "verdicts.jsonl")}
    first = judge_of(**cache)
    verdicts = first(ITEMS)
    assert first.pop_metrics() == {
        "judge/error_rate": 0, "judge/requests": 5, "judge/retries": 0, "judge/cache_hits": 0,
    }  # fmt: skip
    moved = judge_of(shutil.copytree(folder, tmp_path / "moved"), **cache)
    assert moved(ITEMS) == verdicts
    assert moved.pop_metrics()["judge/cache_hits"] == 5
    other = judge_of(build_tiny_folder(tmp_path / "other", vision=False, seed=1), **cache)
    assert other(ITEMS) != verdicts
    assert other.pop_metrics()["judge/requests"] == 5
    longer = judge_of(max_tokens=13, **cache)
    longer(ITEMS[:1])
    assert longer.pop_metrics()["judge/requests"] == 1


def test_a_run_that_is_asked_to_stop_keeps_what_was_judged_and_can_go_on(judge_of, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_judge, "parse_verdict", readable)
    path = tmp_path / "verdicts.jsonl"
    judged = []
    judge = judge_of(stop=lambda: path.exists() and path.read_text().count("\n") >= len(judged), cache_path=str(path))
    judged += [0, 0, 0, 0]
    with pytest.raises(JudgeInterrupted):
        judge([*ITEMS, *(JudgeItem("How many?", "5", f"Maybe {n} or {n}.", f"p{n}") for n in range(9))])
    kept = path.read_text().count("\n")
    assert 4 <= kept < 14
    assert judge.engine.num_waiting + judge.engine.num_running == 0
    judged += [0] * 100
    again = judge_of(cache_path=str(path))
    assert len(again(ITEMS)) == 5
    assert again.pop_metrics()["judge/cache_hits"] >= 1


def test_programs_are_launched_under_the_lock_of_the_run(judge_of):
    lock, held = threading.Lock(), []

    class Launching:
        def __enter__(self):
            held.append(lock.acquire(blocking=False))

        def __exit__(self, *_):
            lock.release()

    judge = judge_of(launching=Launching)
    steps = judge.engine.stats.decode_calls
    judge(ITEMS[:2])
    assert all(held)
    assert len(held) >= judge.engine.stats.decode_calls - steps > 0


def test_the_runs_counter_is_left_to_the_runs_own_warm_up(judge_of):
    with CompileCounter() as counter:
        judge = judge_of(counter=counter)
        assert counter.count > 3
        jax.jit(lambda x: x + 1)(1.0)  # a program of the run, which is still to be warmed up
        assert counter.after_warm == 0
        counter.warm("ril")
        judge(ITEMS)
        assert counter.after_warm == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": SHAPES | {"max_model_len": 100}}, r"judge cannot read question 'q3': .*judge\.engine\.max_model"),
        ({"engine": SHAPES | {"page_size": 0}}, r"config\.reward\.judge\.engine\.page_size is 0"),
        ({"engine": SHAPES | {"pages": 3}}, r"judge\.engine\.pages is no field of the engine: did you mean"),
    ],
)
def test_shapes_that_do_not_fit_are_named(judge_of, fields, message):
    with pytest.raises(InputError, match=message):
        judge_of(**fields)(ITEMS)
