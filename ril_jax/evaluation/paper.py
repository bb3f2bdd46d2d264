"""The paper's table of 14 benchmarks (arXiv 2510.19307), to stand beside ours: paper_table.csv."""

import csv
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

METHODS = ("base", "RL Dr.GRPO", "RIL (Both)")  # what stands beside a result


@dataclass(frozen=True)
class PaperRow:
    """Scores of one model by title of the benchmark, in percent."""

    model: str
    method: str
    scores: dict[str, float]

    def average(self, titles: Sequence[str]) -> float:
        """The mean over these benchmarks; over all 14 it is the average that the paper's rows are compared by."""
        return sum(self.scores[title] for title in titles) / len(titles)


@functools.cache
def paper_rows() -> tuple[PaperRow, ...]:
    """Every row of the table."""
    text = resources.files("ril_jax.evaluation").joinpath("paper_table.csv").read_text(encoding="utf-8")
    rows = []
    for record in csv.DictReader(text.splitlines()):
        model, method = record.pop("model"), record.pop("method")
        rows.append(PaperRow(model, method, {title: float(value) for title, value in record.items()}))
    return tuple(rows)


def paper_model(name: str) -> str:
    """Which of the paper's students a model's name or path speaks of ("Qwen2.5-VL-7B"); "" for none."""
    plain = re.sub(r"[^a-z0-9.]", "", name.lower())
    models = dict.fromkeys(row.model for row in paper_rows())
    found = [model for model in models if re.sub(r"[^a-z0-9.]", "", model.lower()) in plain]
    return found[-1] if found else ""
