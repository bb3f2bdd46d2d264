"""What judges that ask a model share: nothing is asked twice, and nothing that needs no model is asked at all."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ril_jax.errors import InputError
from ril_jax.rewards.rules import is_degenerate
from ril_jax.rewards.verdict import PROMPT_VERSION, JudgeItem, Verdict
from ril_jax.rewards.verdict_cache import VerdictCache

DEGENERATE = Verdict(0.0, "empty or degenerate response")


class JudgeInterrupted(RuntimeError):
    """The run was asked to stop while it waited for the judge; verdicts that had arrived are in the cache."""


class ModelJudge:
    """A judge behind a cache of verdicts; subclasses say how a model is asked (`_ask_all`).

    A verdict is kept under question, solution, response, who judges (`identity`, anything that JSON can hold) and the
    version of the prompt. `stop` is asked now and then while the model is at work, and once it is true,
    JudgeInterrupted is raised: that is how a run that got SIGTERM can still save itself. Not thread-safe.
    """

    overlaps = True  # worth running beside other work

    def __init__(
        self,
        identity: Sequence[Any],
        *,
        cache_path: str = "",
        cache_size: int = 100_000,
        notify: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        self._identity = list(identity)
        self._notify = notify or (lambda line: print(line, file=sys.stderr, flush=True))
        self._stop = stop
        self._cache = VerdictCache(cache_path, cache_size, self._notify)
        self._counts: Counter[str] = Counter()

    def __call__(self, questions: Sequence[JudgeItem]) -> list[Verdict]:
        """One verdict an item, in order; empty and degenerate responses score 0 without being asked about.

        Raises InputError, naming the question, for an empty solution, and JudgeInterrupted.
        """
        verdicts: dict[int, Verdict] = {}
        asked: dict[str, list[int]] = {}  # equal items are asked about once
        for i, item in enumerate(questions):
            if not item.solution.strip():
                raise InputError(f"question {item.id!r}: solution is empty: give every question one.")
            key = VerdictCache.key(item.question, item.solution, item.response, *self._identity, PROMPT_VERSION)
            if is_degenerate(item.response):
                verdicts[i] = DEGENERATE
            elif cached := self._cache.get(key):
                verdicts[i] = cached
                self._counts["cache_hits"] += 1
            else:
                asked.setdefault(key, []).append(i)
        if asked:
            answers: dict[str, Verdict] = {}

            def answered(key: str, verdict: Verdict) -> None:
                answers[key] = verdict
                if verdict.error is None:
                    self._cache.put(key, verdict)  # at once: a run killed while it waits loses nothing

            self._ask_all({key: questions[where[0]] for key, where in asked.items()}, answered)
            verdicts.update((i, answers[key]) for key, where in asked.items() for i in where)
        result = [verdicts[i] for i in range(len(questions))]
        self._counts["judged"] += len(result)
        self._counts["errors"] += sum(verdict.error is not None for verdict in result)
        return result

    def pop_metrics(self) -> dict[str, float]:
        """Since the last call: share of verdicts that could not be read, requests, failed requests, cache hits."""
        counts, self._counts = self._counts, Counter()
        return {
            "judge/error_rate": counts["errors"] / max(counts["judged"], 1),
            "judge/requests": float(counts["requests"]),
            "judge/retries": float(counts["retries"]),
            "judge/cache_hits": float(counts["cache_hits"]),
        }

    def _ask_all(self, items: dict[str, JudgeItem], answered: Callable[[str, Verdict], None]) -> None:
        """Ask the model about every item, and call `answered(key, verdict)` as verdicts come."""
        raise NotImplementedError
