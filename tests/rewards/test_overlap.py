"""Claims about judging beside other work: the time is that of the longer of the two, and the verdicts are the same."""

import threading
import time

import pytest

from ril_jax.rewards.judge import JudgeItem, RulesJudge, Verdict
from ril_jax.rewards.overlap import Verdicts


class SlowJudge:
    """Takes `seconds` a call; says in which thread it was called with what."""

    overlaps = True

    def __init__(self, seconds=0.0, stop=None):
        self.seconds, self.calls, self.threads, self.stop = seconds, [], [], stop

    def __call__(self, questions):
        self.calls.append([item.response for item in questions])
        self.threads.append(threading.current_thread().name)
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            if self.stop is not None and self.stop():
                raise RuntimeError("interrupted")
            time.sleep(0.01)
        return [Verdict(float(item.response == item.solution), f"on {item.response}") for item in questions]

    def pop_metrics(self):
        return {}


def items(*responses):
    return [JudgeItem("How many?", "5", response, "q") for response in responses]


def test_judging_runs_beside_other_work():
    judge = SlowJudge(0.5)
    began = time.monotonic()
    with Verdicts(judge, threading.Event()) as verdicts:
        verdicts.ask(items("5"))
        time.sleep(0.5)
        assert [v.score for v in verdicts.get(items("5"))] == [1.0]
    assert time.monotonic() - began < 0.85
    assert judge.threads == ["judge"]


def test_what_was_asked_in_parts_comes_out_in_the_order_of_the_question():
    judge = SlowJudge(0.05)
    with Verdicts(judge, threading.Event()) as verdicts:
        verdicts.ask(items("teacher", "5"))
        verdicts.ask(items("a", "b"))
        verdicts.ask([])
        got = verdicts.get(items("a", "teacher", "b", "5", "5", "late"))
    assert [v.explanation for v in got] == ["on a", "on teacher", "on b", "on 5", "on 5", "on late"]
    assert [v.score for v in got] == [0, 0, 0, 1, 1, 0]
    assert sorted(response for call in judge.calls for response in call) == ["5", "a", "b", "late", "teacher"]


def test_a_judge_that_needs_no_model_is_asked_in_place():
    with Verdicts(RulesJudge(), threading.Event()) as verdicts:
        verdicts.ask(items("5"))
        assert [v.score for v in verdicts.get(items("5", "6"))] == [1.0, 0.0]
        assert "judge" not in [thread.name for thread in threading.enumerate()]


def test_what_the_judge_raises_is_raised_where_verdicts_are_wanted():
    class Broken(SlowJudge):
        def __call__(self, questions):
            raise ValueError("no verdict today")

    with Verdicts(Broken(), threading.Event()) as verdicts:
        verdicts.ask(items("5"))
        time.sleep(0.05)
        with pytest.raises(ValueError, match="no verdict today"):
            verdicts.get(items("5"))


def test_work_that_fails_does_not_wait_for_the_judge():
    abandon = threading.Event()
    judge = SlowJudge(30.0, stop=abandon.is_set)
    began = time.monotonic()

    def work():
        with Verdicts(judge, abandon) as verdicts:
            verdicts.ask(items("5"))
            while not judge.calls:
                time.sleep(0.01)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert time.monotonic() - began < 5
    assert not abandon.is_set()  # for the next batch
    assert "judge" not in [thread.name for thread in threading.enumerate()]
