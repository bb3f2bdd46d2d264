"""MMMU-Pro (arXiv 2409.02813): MMMU's questions with ten options, and as pictures of themselves; the mean of both."""

from ril_jax.evaluation.benchmark import MultipleChoice, Part, in_place
from ril_jax.evaluation.benchmarks.mmmu import MARKS
from ril_jax.evaluation.rows import LETTERS, Row

_DIRECT = "Answer directly with the option letter from the given choices. "


class MMMUPro(MultipleChoice):
    """The questions of MMMU_Pro_V stand in their pictures; all that the model is told is to answer them."""

    name, title = "mmmu_pro", "MMMU-Pro"
    files = (("MMMU_Pro_10c.tsv",), ("MMMU_Pro_V.tsv",))
    source = "VLMEvalKit, vlmeval/dataset/image_mcq.py, MMMUProDataset (prompt); MMMU-Pro, section 3 (mean of both)"

    def prompt(self, row: Row) -> list[Part]:
        if _is_picture(row):
            return [*range(row.num_images), f"Answer the following multiple-choice question in the image. {_DIRECT}"]
        options = "".join(f"{letter}. {text}\n" for letter, text in row.options.items())
        text = f"Question: {row.need('question')}\nOptions:\n{options}{_DIRECT}"
        return in_place(text, row.num_images, MARKS, row.where)

    def options(self, row: Row) -> dict[str, str]:
        """Where the picture has the options, only their letters are known."""
        return row.options or dict.fromkeys(LETTERS[:10], "")


def _is_picture(row: Row) -> bool:
    return row.part.startswith("MMMU_Pro_V")
