"""BLINK: visual perception over one to four pictures, with options (arXiv 2404.12390); the mean over all questions."""

from ril_jax.evaluation.benchmark import MultipleChoice


class Blink(MultipleChoice):
    name, title = "blink", "BLINK"
    files = (("BLINK.tsv",),)
