"""AI2D: school science diagrams, four options, labels masked in the picture (arXiv 1603.07396)."""

from ril_jax.evaluation.benchmark import MultipleChoice


class AI2D(MultipleChoice):
    name, title = "ai2d", "AI2D"
    files = (("AI2D_TEST.tsv",),)
