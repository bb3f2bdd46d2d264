"""Claims about intervals."""

import math

import numpy as np
import pytest

from ril_jax.evaluation.statistics import bootstrap_interval, mean_of_parts


def test_the_interval_is_that_of_the_normal_approximation_where_that_holds():
    scores = [1.0] * 600 + [0.0] * 400
    low, high = bootstrap_interval([scores], resamples=4000)
    margin = 1.96 * math.sqrt(0.6 * 0.4 / 1000)
    # Each end is a quantile of 4000 draws, whose own error is about a fiftieth of the margin times two.
    assert low == pytest.approx(0.6 - margin, abs=0.15 * margin)
    assert high == pytest.approx(0.6 + margin, abs=0.15 * margin)


def test_parts_count_alike_whatever_their_sizes():
    parts = [[1.0] * 10, [0.0] * 1000]
    assert mean_of_parts(parts) == 0.5
    assert bootstrap_interval(parts, resamples=50) == (0.5, 0.5)


def test_the_interval_of_two_parts_is_that_of_their_mean():
    rng = np.random.default_rng(1)
    parts = [(rng.random(n) < p).astype(float).tolist() for n, p in ((500, 0.3), (800, 0.7))]
    low, high = bootstrap_interval(parts, resamples=4000)
    error = 0.5 * math.sqrt(sum(np.var(part) / len(part) for part in parts))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (high + low) / 2 == pytest.approx(mean_of_parts(parts), abs=0.2 * error)


def test_the_same_scores_have_the_same_interval():
    scores = [0.0, 1.0, 0.5, 1.0]
    assert bootstrap_interval([scores], resamples=100) == bootstrap_interval([scores], resamples=100)
