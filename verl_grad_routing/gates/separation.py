"""How far the scores of a batch fall into two groups: numbers without units, invariant to shift and positive scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """The best cut of N scores into a lower and an upper class."""

    highest_low: float
    """Highest score of the lower class."""
    lowest_high: float
    """Lowest score of the upper class."""
    between_share: float
    """Variance between the classes as a share of the total variance, in [0, 1]."""


def otsu_split(scores: np.ndarray) -> Split | None:
    """The cut that maximises the variance between the two classes; ``None`` when all scores are equal.

    With scores sorted and centred and S_k the sum of the k lowest, the variance between {1..k} and {k+1..N} is
    ``S_k**2 / (k (N - k))`` (N. Otsu, IEEE Trans. SMC 9(1):62-66, 1979, eq. 18, on the scores themselves instead of a
    histogram). Exact: every cut between two different scores is tried, none inside a tie. Of equally good cuts the one
    with the smallest upper class is taken. O(N log N).
    """
    ordered = np.sort(scores)
    size = len(ordered)
    cuts = np.flatnonzero(ordered[1:] > ordered[:-1]) + 1  # sizes of possible lower classes
    if not len(cuts):
        return None
    centred = _centred(ordered)
    between = np.cumsum(centred)[cuts - 1] ** 2 / (cuts * (size - cuts))
    best = len(cuts) - 1 - int(np.argmax(between[::-1]))
    total = float((centred**2).mean())
    cut = cuts[best]
    return Split(float(ordered[cut - 1]), float(ordered[cut]), min(float(between[best]) / total, 1.0))


def between_share(scores: np.ndarray) -> float:
    """``Split.between_share`` of the best cut: two points 1, uniform 0.75, normal 2/pi = 0.637; equal scores 0."""
    split = otsu_split(scores)
    return split.between_share if split else 0.0


def bimodality(scores: np.ndarray) -> float:
    """Sarle's bimodality coefficient ``(skewness**2 + 1) / kurtosis`` of the population, in [0, 1].

    Two points 1, uniform 5/9, normal 1/3; equal scores 0. A skewed single mode raises it too (exponential: 5/9).
    """
    if scores.min() == scores.max():
        return 0.0  # their mean, rounded, may differ from all of them
    centred = _centred(scores)
    second, third, fourth = (float((centred**power).mean()) for power in (2, 3, 4))
    return min((third**2 / second**3 + 1) * second**2 / fourth, 1.0)


def _centred(scores: np.ndarray) -> np.ndarray:
    """Scores without their mean, over the power of two that brings the largest to [0.5, 1): powers stay in range."""
    centred = scores - scores.mean()
    return np.ldexp(centred, -np.frexp(np.abs(centred).max())[1])


MEASURES: Mapping[str, Callable[[np.ndarray], float]] = {"between_share": between_share, "bimodality": bimodality}
