"""SEED-Bench's questions about single pictures (arXiv 2307.16125), and SEED-Bench-2-Plus (arXiv 2404.16790)."""

from ril_jax.evaluation.benchmark import MultipleChoice


class SeedBench(MultipleChoice):
    name, title = "seedbench", "SEED"
    files = (("SEEDBench_IMG.tsv",),)


class SeedBench2Plus(MultipleChoice):
    name, title = "seedbench2_plus", "SEED2+"
    files = (("SEEDBench2_Plus.tsv",),)
