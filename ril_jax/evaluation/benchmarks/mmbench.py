"""MMBench and its Chinese edition (arXiv 2307.06281), by circular evaluation.

A question stands in the file once for every rotation of its options: row n, then n + 1,000,000, n + 2,000,000, ...
It is right only if all of its rotations are.
"""

from ril_jax.errors import InputError
from ril_jax.evaluation.benchmark import MultipleChoice
from ril_jax.evaluation.rows import Row

_ROTATION = 1_000_000


class MMBench(MultipleChoice):
    name, title = "mmbench", "MMBench"
    files = (("MMBench_DEV_EN_V11.tsv", "MMBench_DEV_EN.tsv", "MMBench_V11.tsv", "MMBench.tsv"),)
    rule = f"{MultipleChoice.rule}; circular: a question is right if all rotations of its options are"

    def group(self, row: Row) -> str:
        if not row.index.isdigit():
            raise InputError(
                f"{row.where}: the index {row.index} is no number, which rotations need; download it again"
            )
        return f"{row.part}/{int(row.index) % _ROTATION}"


class MMBenchCN(MMBench):
    name, title = "mmbench_cn", "MMBench-CN"
    files = (("MMBench_DEV_CN_V11.tsv", "MMBench_DEV_CN.tsv", "MMBench_CN_V11.tsv", "MMBench_CN.tsv"),)
