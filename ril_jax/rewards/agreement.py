"""How far two ways to judge agree: rules, a judge, and what people said of the same responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ril_jax.rewards.verdict import JudgeItem, Verdict


@dataclass(frozen=True)
class Agreement:
    """Counts of N responses: right by both, by the first alone, by the second alone, and by neither.

    The second is what the first is measured by. A figure that is not defined (no response is right, say) is None.
    """

    both: int
    first: int
    second: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Agreement:
        pairs = list(zip(first, second, strict=True))
        counts = [sum(pair == kind for pair in pairs) for kind in ((True, True), (True, False), (False, True))]
        both, one, two = counts
        return cls(both, one, two, len(pairs) - sum(counts))

    @property
    def total(self) -> int:
        return self.both + self.first + self.second + self.neither

    @property
    def accuracy(self) -> float | None:
        """Share on which they agree."""
        return _share(self.both + self.neither, self.total)

    @property
    def precision(self) -> float | None:
        """Of what the first calls right, the share that the second does."""
        return _share(self.both, self.both + self.first)

    @property
    def recall(self) -> float | None:
        """Of what the second calls right, the share that the first does."""
        return _share(self.both, self.both + self.second)

    @property
    def kappa(self) -> float | None:
        """Cohen's: agreement above what two with these shares of right have by chance; 1 is full, 0 is chance."""
        n = self.total
        if not n:
            return None
        right = (self.both + self.first) * (self.both + self.second)
        wrong = (self.second + self.neither) * (self.first + self.neither)
        chance = (right + wrong) / n**2
        return None if chance == 1 else ((self.both + self.neither) / n - chance) / (1 - chance)


def report(
    items: Sequence[JudgeItem],
    labels: Sequence[bool],
    rules: Sequence[Verdict],
    judge: Sequence[Verdict] | None,
    *,
    listed: int = 20,
) -> str:
    """A table of agreement, and the first `listed` responses on which not all agree.

    labels: what people said. judge: None where the rules are the only judge. A verdict that cannot be read counts as
    wrong, as it does in a run.
    """
    by_rules = [verdict.score == 1 for verdict in rules]
    by_judge = None if judge is None else [verdict.score == 1 for verdict in judge]
    pairs = [("rules by label", Agreement.of(by_rules, labels))]
    if by_judge is not None:
        pairs += [
            ("judge by label", Agreement.of(by_judge, labels)),
            ("rules by judge", Agreement.of(by_rules, by_judge)),
        ]
    lines = [f"{len(items):,} responses, {sum(labels):,} of them right by label, {sum(by_rules):,} by rules"]
    if by_judge is not None and judge is not None:
        unreadable = sum(verdict.error is not None for verdict in judge)
        lines[0] += f", {sum(by_judge):,} by the judge"
        lines.append(f"the judge gave {unreadable:,} verdicts that cannot be read; they count as wrong")
    columns = ("accuracy", "precision", "recall", "kappa")
    counts = ("both right", "first only", "second only", "both wrong")
    lines.append(" " * 14 + "".join(f"  {name:>11}" for name in (*columns, *counts)))
    for name, agreement in pairs:
        figures = [_told(getattr(agreement, column)) for column in columns]
        numbers = (agreement.both, agreement.first, agreement.second, agreement.neither)
        lines.append(f"{name:<14}" + "".join(f"  {word:>11}" for word in (*figures, *(f"{n:,}" for n in numbers))))
    ways = [by_rules, labels] if by_judge is None else [by_rules, by_judge, labels]
    apart = [i for i in range(len(items)) if len({way[i] for way in ways}) > 1]
    lines.append(f"not of one opinion: {len(apart):,}" + (f", the first {listed}:" if len(apart) > listed else ""))
    for i in apart[:listed]:
        said = [f"label {labels[i]:d}", f"rules {by_rules[i]:d}"]
        if by_judge is not None and judge is not None:
            said.append(f"judge {by_judge[i]:d}" + (f" ({judge[i].error})" if judge[i].error else ""))
        lines.append(f"  {items[i].id}: {', '.join(said)}; solution {_short(items[i].solution)}")
        lines.append(f"    response: {_short(items[i].response, 200)}")
        if judge is not None and judge[i].explanation:
            lines.append(f"    judge: {_short(judge[i].explanation, 200)}")
    return "\n".join(lines)


def _share(count: int, total: int) -> float | None:
    return count / total if total else None


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= limit else f"...{line[3 - limit :]}")
