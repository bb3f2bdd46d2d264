"""ChartQA: charts, short answers, relaxed accuracy (arXiv 2203.10244)."""

import ast

from ril_jax.evaluation.benchmark import Benchmark, Part
from ril_jax.evaluation.numbers import final_answer, relaxed_correct
from ril_jax.evaluation.rows import Row


class ChartQA(Benchmark):
    name, title = "chartqa", "ChartQA"
    files = (("ChartQA_TEST.tsv",),)
    source = "VLMEvalKit, vlmeval/dataset/image_vqa.py (prompt); ChartQA, section 5.1, as in pix2struct (rule)"
    rule = "relaxed accuracy: a number within 5 % of the answer, or the answer's text"

    def prompt(self, row: Row) -> list[Part]:
        text = f"{row.need('question')}\nAnswer the question using a single word or phrase."
        return [*range(row.num_images), text]

    def parse(self, row: Row, response: str) -> str | None:
        return final_answer(response) or None

    def score(self, row: Row, parsed: str) -> float:
        return float(any(relaxed_correct(parsed, target) for target in answers(row)))

    def categories(self, row: Row) -> list[str]:
        return [row.fields[name] for name in ("split", "category") if name in row.fields]


def answers(row: Row) -> list[str]:
    """The right answers of a row: one, or a Python list of them."""
    text = row.need("answer").strip()
    if text.startswith("["):
        try:
            return [str(part) for part in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            return [text]
    return [text]
