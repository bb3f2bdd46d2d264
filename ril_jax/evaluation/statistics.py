"""Means of scores, and how sure they are."""

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(parts: Sequence[Sequence[float]], *, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over parts of each part's mean, by drawing questions anew.

    parts: scores from 0 to 1, none of them empty; a benchmark of one file has one part. The same input gives the same
    interval.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for part in parts:
        scores = np.asarray(part, np.float64)
        for i in range(resamples):  # one at a time: a benchmark has up to 18,000 questions
            means[i] += scores[generator.integers(0, len(scores), len(scores))].mean() / len(parts)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def mean_of_parts(parts: Sequence[Sequence[float]]) -> float:
    """The mean over parts of each part's mean."""
    return float(np.mean([np.mean(part) for part in parts]))
