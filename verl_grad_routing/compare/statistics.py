"""Rates with intervals.

A rate of one run counts its validation samples: its Wilson interval (Wilson 1927, doi:10.1080/01621459.1927.10502953)
says how far the prompts and the sampling could have moved it. Of other seeds it says nothing; ``mean_interval`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from verl_grad_routing.errors import UserError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``total`` independent samples.

    Raises:
        UserError: No samples, or more hits than samples.
    """

    hits: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.total or self.total == 0:
            raise UserError("rate", f"{self.hits}/{self.total}", "needs at least one sample and no more hits")

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.hits / self.total

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the Wilson interval at ``CONFIDENCE``."""
        return wilson(self.hits, self.total)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.interval[1]

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson(hits: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of a binomial proportion, without continuity correction."""
    interval = stats.binomtest(hits, total).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def disjoint(a: Rate, b: Rate) -> bool:
    """Whether the intervals of ``a`` and ``b`` have no point in common (stricter than a test of the difference)."""
    return a.high < b.low or b.high < a.low


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean over seeds with its Student t interval, clipped to [0, 1]: ``(mean, low, high)``; needs two values."""
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        raise UserError("seeds", len(sample), "an interval over seeds needs at least two")
    mean, error = float(sample.mean()), float(stats.sem(sample))
    if error == 0.0:
        return mean, mean, mean
    low, high = stats.t.interval(confidence, len(sample) - 1, loc=mean, scale=error)
    return mean, max(0.0, float(low)), min(1.0, float(high))
