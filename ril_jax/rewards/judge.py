"""Judges: whoever says whether a response's answer is right, by rule or by asking a model."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

from ril_jax.errors import InputError
from ril_jax.rewards.model_judge import DEGENERATE, JudgeInterrupted
from ril_jax.rewards.openai_judge import OpenAIJudge, OpenAIJudgeConfig
from ril_jax.rewards.rules import AnswerRules, is_degenerate, score_answer
from ril_jax.rewards.verdict import JudgeItem, Verdict

__all__ = [
    "Judge",
    "JudgeInterrupted",
    "JudgeItem",
    "OpenAIJudge",
    "OpenAIJudgeConfig",
    "RulesJudge",
    "Verdict",
    "make_judge",
    "open_judge",
]

KINDS = ("rules", "openai", "engine", "none")


class Judge(Protocol):
    """Gives one verdict an item, in order; `pop_metrics` gives what happened since it was last called.

    `overlaps` says whether it is worth running beside other work.
    """

    overlaps: bool

    def __call__(self, questions: Sequence[JudgeItem]) -> list[Verdict]: ...

    def pop_metrics(self) -> dict[str, float]: ...


def make_judge(
    config: Mapping[str, Any],
    *,
    notify: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **engine: Any,
) -> Judge | None:
    """The judge of a config: {"kind": one of KINDS} and the fields of the kinds.

    The fields are those of AnswerRules, OpenAIJudgeConfig and EngineJudgeConfig; those of another kind may stand there
    unused. "none" gives None. `notify` and `stop` as in ModelJudge; `engine`: further arguments of EngineJudge. Raises
    InputError for an unknown kind or field and for bad values.
    """
    from ril_jax.rewards.engine_judge import EngineJudge, EngineJudgeConfig  # brings JAX with it

    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise InputError(f"judge.kind is {kind!r}: use one of {', '.join(KINDS)}.")
    kinds: tuple[Any, ...] = (AnswerRules, OpenAIJudgeConfig, EngineJudgeConfig)
    known = {field.name for made in kinds for field in fields(made)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"judge.{name} is no field of the judge" + (f": did you mean {near[0]}?" if near else "."))

    def own(made: Any) -> dict[str, Any]:
        return {field.name: values[field.name] for field in fields(made) if field.name in values}

    if kind == "rules":
        rules = own(AnswerRules)
        if "patterns" in rules:
            rules["patterns"] = tuple(rules["patterns"])
        return RulesJudge(AnswerRules(**rules))
    if kind == "openai":
        return OpenAIJudge(OpenAIJudgeConfig(**own(OpenAIJudgeConfig)), notify, stop)
    if kind == "engine":
        return EngineJudge(EngineJudgeConfig(**own(EngineJudgeConfig)), notify=notify, stop=stop, **engine)
    return None


def open_judge(
    config: Mapping[str, Any], workdir: str | os.PathLike[str] | None, *, notify: Callable[[str], None] | None = None
) -> Judge | None:
    """The judge of a run's config (`reward.judge`), for work beside a run.

    workdir: where the run has its cache of verdicts, which is used then; none is kept without it. Raises InputError as
    `make_judge` does, and where the config has no judge.
    """
    if "reward" not in config or "judge" not in config["reward"]:
        raise InputError("--config has no reward.judge; give the config of a run, such as configs/qwen7b.py")
    judge = config["reward"]["judge"].to_dict()
    for field in ("cache_path", "checkpoint"):
        if "{workdir}" in judge[field]:
            judge[field] = judge[field].replace("{workdir}", str(workdir)) if workdir else ""
    return make_judge(judge, notify=notify)


class RulesJudge:
    """Compares final answers with solutions by `rules.score_answer`; needs no model and no network."""

    overlaps = False

    def __init__(self, rules: AnswerRules | None = None):
        self._rules = rules or AnswerRules()

    def __call__(self, questions: Sequence[JudgeItem]) -> list[Verdict]:
        """One verdict an item; raises InputError, naming the question, for an empty solution."""
        return [self._judge(item) for item in questions]

    def pop_metrics(self) -> dict[str, float]:
        return {"judge/error_rate": 0.0}

    def _judge(self, item: JudgeItem) -> Verdict:
        try:
            score = score_answer(item.response, item.solution, self._rules)
        except InputError as error:
            raise InputError(f"question {item.id!r}: {error}") from error
        if score == 0 and is_degenerate(item.response):
            return DEGENERATE
        return Verdict(
            score, "the final answer equals the solution" if score else "the final answer is not the solution"
        )
