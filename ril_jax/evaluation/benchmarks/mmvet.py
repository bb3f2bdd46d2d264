"""MM-Vet (arXiv 2308.02490) and MM-Vet v2 (arXiv 2408.00765): open answers, graded from 0 to 1 by a model."""

from typing import ClassVar

from ril_jax.evaluation.asking import grade_messages, read_grade
from ril_jax.evaluation.benchmark import Benchmark, Part
from ril_jax.evaluation.rows import Row

_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math", "seq")


class MMVet(Benchmark):
    name, title = "mmvet", "MM-Vet"
    files: ClassVar[tuple[tuple[str, ...], ...]] = (("MMVet.tsv", "MM-Vet.tsv"),)
    source = "MM-Vet, mm-vet_evaluator.py, as in VLMEvalKit, vlmeval/dataset/utils/mmvet.py; the prompt is the question"
    rule = "a model's grade from 0.0 to 1.0 in tenths, by the ground truth with its <AND> and <OR>"
    judge = "must"

    def prompt(self, row: Row) -> list[Part]:
        return [*range(row.num_images), row.need("question")]

    def parse(self, row: Row, response: str) -> str | None:
        return None

    def score(self, row: Row, parsed: str) -> float:
        return float(parsed)

    def judge_messages(self, row: Row, response: str) -> list[dict[str, str]]:
        return grade_messages(row.need("question"), row.need("answer"), response)

    def read_judge(self, row: Row, reply: str) -> str | None:
        return read_grade(reply)

    def categories(self, row: Row) -> list[str]:
        words = row.get("category").replace(",", " ").split()
        return [name for name in _CAPABILITIES if name in words]


class MMVetV2(MMVet):
    """Questions may hold several images, in their places."""

    name, title = "mmvet_v2", "MM-Vet-v2"
    files = (("mm-vet-v2.json", "MMVet_v2.tsv", "MM-Vet-v2.tsv"),)
    source = "MM-Vet v2, v2/mm-vet-v2_evaluator.py; the prompt is the question"

    def prompt(self, row: Row) -> list[Part]:
        texts = row.need("question").strip().split("<image>")
        if len(texts) != row.num_images + 1:
            return super().prompt(row)
        parts: list[Part] = [texts[0]]
        for number, text in enumerate(texts[1:]):
            parts += [number, text]
        return [part for part in parts if part != ""]
