"""Claims about the judge inside the RIL loop: it works beside the loop, and changes nothing by that."""

import shutil
import time

import pytest
from helpers import small_run

from ril_jax.rewards.judge import JudgeInterrupted, RulesJudge, Verdict
from ril_jax.training import rewards
from ril_jax.training.metrics import read_metrics
from ril_jax.training.ril import Ril
from ril_jax.training.run import Stopped

STEPS = 6  # of the small config


class ThreadedRules(RulesJudge):
    """The rules as a judge that overlaps, each call taking `seconds`; `fail_at` names a call that is interrupted."""

    overlaps = True
    seconds, fail_at = 0.0, 0
    calls = 0

    def __call__(self, questions) -> list[Verdict]:
        type(self).calls += 1
        if self.calls == self.fail_at:
            raise JudgeInterrupted("asked to stop")
        time.sleep(self.seconds)
        return super().__call__(questions)


@pytest.fixture
def threaded(monkeypatch):
    def use(seconds=0.0, fail_at=0):
        judge = type("Judge", (ThreadedRules,), {"seconds": seconds, "fail_at": fail_at, "calls": 0})
        monkeypatch.setattr(rewards, "make_judge", lambda *_, **__: judge())
        return judge

    return use


def train(workdir):
    small_run.train_here(workdir, small_run.small_config(**{"checkpoint.every": 1}), "ril")


def outcome(workdir):
    metrics = read_metrics(workdir / "metrics" / "ril" / "ril.jsonl", wall_clock=False)
    return metrics, (workdir / "ril" / "ril" / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def expected(trained_workdir, tmp_path_factory, request):
    """The outcome with the rules asked in place; made once."""
    kept = request.session.__dict__.setdefault("_judged_in_place", {})
    if "outcome" not in kept:
        workdir = shutil.copytree(trained_workdir, tmp_path_factory.mktemp("in_place") / "workdir")
        train(workdir)
        kept["outcome"] = outcome(workdir)
    return kept["outcome"]


def test_the_loop_works_on_while_the_judge_judges(expected, workdir, threaded, monkeypatch):
    judge = threaded(seconds=0.4)  # twice a step: the teachers' responses, then the student's
    discriminate = Ril.discriminate

    def slow(*args):
        time.sleep(0.8)
        return discriminate(*args)

    monkeypatch.setattr(Ril, "discriminate", slow)
    train(workdir)
    assert STEPS <= judge.calls <= 2 * STEPS
    assert outcome(workdir) == expected
    times = [line["step_time"] for line in read_metrics(workdir / "metrics" / "ril" / "ril.jsonl")]
    assert min(times) < 0.8 + 0.8 - 0.3  # one after the other it would be their sum and more


def test_a_run_that_is_stopped_while_it_waits_for_the_judge_goes_on_to_the_same_end(expected, workdir, threaded):
    threaded(fail_at=4)  # of the second step, or of a later one
    with pytest.raises(Stopped):
        train(workdir)
    assert 1 <= len(read_metrics(workdir / "metrics" / "ril" / "ril.jsonl")) < STEPS
    threaded()
    train(workdir)
    assert outcome(workdir) == expected
