"""RealWorldQA: 765 questions about pictures taken from vehicles and the like, with options (xAI)."""

from ril_jax.evaluation.benchmark import MultipleChoice


class RealWorldQA(MultipleChoice):
    name, title = "realworldqa", "RealWorldQA"
    files = (("RealWorldQA.tsv",),)
