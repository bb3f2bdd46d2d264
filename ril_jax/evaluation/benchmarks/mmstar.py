"""MMStar: 1,500 questions that need their picture, four options (arXiv 2403.20330)."""

from ril_jax.evaluation.benchmark import MultipleChoice


class MMStar(MultipleChoice):
    name, title = "mmstar", "MMStar"
    files = (("MMStar.tsv",),)
