"""Claims about the paper's table."""

import pytest

from ril_jax.evaluation.benchmarks import BENCHMARKS
from ril_jax.evaluation.paper import paper_model, paper_rows

# Averages over the 14 published cells.
AVERAGES = {
    ("Qwen2.5-VL-7B", "base"): 69.35, ("Qwen2.5-VL-7B", "RL Dr.GRPO"): 71.11, ("Qwen2.5-VL-7B", "RIL (Both)"): 76.22,
    ("Qwen2.5-VL-3B", "base"): 64.05, ("Qwen2.5-VL-3B", "RIL (Both)"): 72.30,
    ("InternVL3-8B", "base"): 71.36, ("InternVL3-8B", "RL GRPO"): 72.49, ("InternVL3-8B", "RIL (Both)"): 76.26,
    ("InternVL3-2B", "RIL (Qwen2.5-VL-72B)"): 65.95, ("InternVL3-2B", "RIL (Both)"): 68.31,
    ("InternVL3-1B", "base"): 55.72, ("InternVL3-1B", "RIL (InternVL3-78B)"): 59.76,
}  # fmt: skip


def test_averages_are_those_of_the_paper():
    titles = [benchmark.title for benchmark in BENCHMARKS.values()]
    ours = {(row.model, row.method): row.average(titles) for row in paper_rows()}
    assert len(ours) == 30
    for key, average in AVERAGES.items():
        assert ours[key] == pytest.approx(average, abs=0.006), key


def test_columns_are_the_benchmarks_in_their_order():
    assert list(paper_rows()[0].scores) == [benchmark.title for benchmark in BENCHMARKS.values()]


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B"),
        ("Qwen/Qwen2.5-VL-3B-Instruct@main", "Qwen2.5-VL-3B"),
        ("internvl3_8b_ril", "InternVL3-8B"),
        ("InternVL3-78B", ""),
        ("Qwen2.5-VL-32B", ""),
        ("tiny", ""),
    ],
)
def test_the_student_that_a_name_speaks_of(name, student):
    assert paper_model(name) == student
