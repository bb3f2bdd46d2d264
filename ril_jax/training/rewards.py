"""R = R_sim + R_ans (+ users' own): the rewards of one batch, with what they are made of."""

import dataclasses
import json
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ril_jax import objectives, processes
from ril_jax.data.records import Question, plain_prompt, question_prompt
from ril_jax.errors import InputError
from ril_jax.rewards.functions import load_reward_functions
from ril_jax.rewards.judge import Judge, make_judge
from ril_jax.rewards.overlap import Verdicts
from ril_jax.rewards.verdict import JudgeItem
from ril_jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards of B questions with S responses each; every array [B, S] float32.

    total: weighted sum. parts: by name, "similarity", "answer", and users' functions; NaN where one has no opinion.
    explanations: the judge's words, B lists of S.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    explanations: list[list[str]]


class RewardModel:
    """Computes `Rewards` as the config says."""

    def __init__(self, run: Run, config: ConfigDict):
        self._reward = config.reward
        self._abandon = threading.Event()
        # Devices that work together must be given their programs in one order, whichever thread starts them.
        self._launching = threading.Lock()
        self.judge = self._make_judge(run, config.reward.judge) if config.reward.answer_weight else None
        self.functions = load_reward_functions(list(config.reward.functions))
        weights = list(config.reward.function_weights) or [1.0] * len(self.functions)
        if len(weights) != len(self.functions):
            raise InputError(
                f"config.reward.function_weights has {len(weights)} weights for {len(self.functions)} functions"
            )
        self._function_weights = weights
        self._similarity, self._levels = parse_similarity(config.reward.similarity)

    def _make_judge(self, run: Run, config: ConfigDict) -> Judge | None:
        judge = config.to_dict() | {"cache_path": _of_this_process(run.path(config.cache_path))}
        if judge["checkpoint"]:
            judge["checkpoint"] = run.path(judge["checkpoint"])
        alone = processes.count() == 1
        if judge["kind"] == "engine" and not alone:
            raise InputError(
                "config.reward.judge.kind=engine is for runs of one process; serve the judge with ril_jax.serve, and "
                "name it in config.reward.judge.base_url, with kind=openai"
            )

        def stop() -> bool:  # of several processes none may leave alone: they agree at the end of a step
            return self._abandon.is_set() or (alone and run.stop.received is not None)

        return make_judge(judge, notify=print, stop=stop, mesh=run.mesh, counter=run.counter, launching=self.launching)

    def launching(self) -> AbstractContextManager:
        """To be held while device programs are started beside a judge that may start its own."""
        return self._launching

    def judging(self) -> AbstractContextManager[Verdicts | None]:
        """The verdicts of one batch, some of them asked for early, and handed to the call; None without a judge."""
        return nullcontext() if self.judge is None else Verdicts(self.judge, self._abandon)

    def __call__(
        self,
        questions: Sequence[Question],
        responses: Sequence[Sequence[str]],
        logits: np.ndarray | None,
        verdicts: Verdicts | None = None,
    ) -> Rewards:
        """Rewards of all responses; `logits` [B, S] of the discriminator, None without one.

        `verdicts`: of this batch, where some were asked for before.
        """
        parts: dict[str, np.ndarray] = {}
        weights: dict[str, float] = {}
        if logits is not None:
            similarity = objectives.similarity_reward(logits, self._similarity, levels=self._levels)
            parts["similarity"], weights["similarity"] = np.asarray(similarity), self._reward.similarity_weight
        explanations = [["" for _ in row] for row in responses]
        if self.judge is not None:
            items = judge_items(questions, responses)
            given = iter(self.judge(items) if verdicts is None else verdicts.get(items))
            graded = [[next(given) for _ in row] for row in responses]
            parts["answer"] = np.array([[v.score for v in row] for row in graded], np.float32)
            weights["answer"] = self._reward.answer_weight
            explanations = [[v.explanation for v in row] for row in graded]
        for function, weight in zip(self.functions, self._function_weights, strict=True):
            parts[function.name] = _call(function, questions, responses)
            weights[function.name] = weight
        if not parts:
            raise InputError("no reward is left: config turns off discriminator, judge and functions alike")
        # A part without an opinion counts as nothing, not as a reward of zero for being right or wrong.
        total = sum(weights[name] * np.nan_to_num(part, nan=0.0) for name, part in parts.items())
        return Rewards(np.asarray(total, np.float32), parts, explanations)


def _of_this_process(path: str) -> str:
    """The file of verdicts of this process: the first one's as it is named, the others' with their number."""
    if not path or processes.is_first():
        return path
    return str(Path(path).with_suffix(f".{processes.index()}{Path(path).suffix}"))


def judge_items(questions: Sequence[Question], responses: Sequence[Sequence[str]]) -> list[JudgeItem]:
    """What a judge is asked of every response, question by question."""
    return [
        JudgeItem(question=plain_prompt(q), solution=q.solution, response=text, id=q.id)
        for q, row in zip(questions, responses, strict=True)
        for text in row
    ]


def parse_similarity(text: str) -> tuple[Any, int | None]:
    """config.reward.similarity as (kind, levels). Raises InputError for anything unknown."""
    kind, _, count = text.partition("=")
    if kind in ("binary", "continuous", "score") and not count:
        return kind, None
    if kind == "levels" and count.isdigit() and int(count) >= 2:
        return kind, int(count)
    raise InputError(
        f"config.reward.similarity={text!r} is not known; use binary, continuous, score, or levels=K with K at least 2"
    )


def _call(function, questions: Sequence[Question], responses: Sequence[Sequence[str]]) -> np.ndarray:
    flat = [(q, text) for q, row in zip(questions, responses, strict=True) for text in row]
    extras = [json.loads(q.extra) for q, _ in flat]
    names = set.intersection(*(set(extra) for extra in extras)) - {"prompts", "completions", "solutions"}
    values = function(
        prompts=[question_prompt(q) for q, _ in flat],
        completions=[text for _, text in flat],
        solutions=[q.solution for q, _ in flat],
        columns={name: [extra[name] for extra in extras] for name in names} | {"ids": [q.id for q, _ in flat]},
    )
    values = [np.nan if value is None else value for value in values]
    return np.array(values, np.float32).reshape(len(questions), -1)
