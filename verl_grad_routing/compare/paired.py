"""Statistics over seeds: what several runs of an arm say, and how two arms differ on the same seeds.

S is the number of seeds. Seeds are few, so nothing here pretends to more than they give: the smallest p-value that S
seeds can reach is ``least_p(S)``, intervals are widened for it, and fewer than ``STATEMENT_SEEDS`` state nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from verl_grad_routing.compare.statistics import CONFIDENCE
from verl_grad_routing.errors import UserError

RESAMPLES = 9999
BOOTSTRAP_SEED = 0
EXACT_UP_TO = 16  # seeds: 2^16 sign patterns are enumerated, more are sampled
ALPHA, POWER = 0.05, 0.8
STATEMENT_SEEDS = 5  # from least to largest, the widest interval there is, covers 1 - 2 / 2^S: 75% for 3, 94% for 5


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean over seeds with its bootstrap interval; no interval of a single seed."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]" if self.seeds > 1 else f"{self.value:.2f}"


@dataclass(frozen=True)
class Difference:
    """An arm minus its baseline on the seeds that both have.

    Attributes:
        mean: Of the S differences.
        low: Lower end of the paired bootstrap interval.
        high: Upper end.
        p: Of the sign-flip test, two-sided, not corrected.
        detectable: See ``detectable``.
        seeds: S.
        lower: How many of the S differences are below zero.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float
    seeds: int
    lower: int

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is, of seeds enough for a statement."""
        return self.seeds >= STATEMENT_SEEDS and self.high < 0

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is, of seeds enough for a statement."""
        return self.seeds >= STATEMENT_SEEDS and self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]" if self.seeds > 1 else f"{self.mean:+.2f}"


def interquartile_mean(values: Sequence[float] | np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of the values (Agarwal et al. 2021, arXiv 2108.13264, section 4.3).

    Exactly a quarter of the weight is cut from each end: where S/4 is no whole number the outermost value that is left
    counts in part. For S = 5 the sorted weights are 0, 0.75, 1, 0.75, 0. (``scipy.stats.trim_mean``, which their
    library calls, cuts whole values only; the two agree when 4 divides S.)

    Args:
        values: [..., S], finite.
        axis: Of the seeds.
    """
    ordered = np.sort(np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1), axis=-1)
    count = ordered.shape[-1]
    ends = np.arange(count + 1, dtype=np.float64)
    inside = np.clip(ends, count / 4, 3 * count / 4)
    return ordered @ np.diff(inside) / (count / 2)


def estimate(values: Sequence[float]) -> Estimate:
    """Interquartile mean over seeds, interval by bootstrap over seeds. Raises ``UserError`` without values."""
    sample = _finite(values)
    value = float(interquartile_mean(sample))
    return Estimate(value, *_bootstrap(sample, interquartile_mean, value), len(sample))


def difference(arm: Sequence[float], baseline: Sequence[float]) -> Difference:
    """``arm`` minus ``baseline``, entry by entry the same seed, S each.

    The interval is an expanded percentile bootstrap over seeds of the mean difference (9999 resamples, fixed
    generator), see ``expanded``. BCa is not used: its acceleration would be estimated from S values, and it does not
    exist where rates saturate and all differences are equal.

    Raises:
        UserError: No seeds, or unequal numbers of them.
    """
    if len(arm) != len(baseline):
        raise UserError("seeds", f"{len(arm)} and {len(baseline)}", "differences are paired: give the same seeds")
    differences = _finite(arm) - _finite(baseline)
    mean = float(differences.mean())
    low, high = _bootstrap(differences, np.mean, mean)
    p, lower = sign_flip_p(differences), int((differences < 0).sum())
    return Difference(mean, low, high, p, detectable(differences), len(differences), lower)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of "the signs of the S differences are fair coins", by the sum; exact for up to 16 seeds.

    It assumes nothing of their distribution, only that under no effect each difference is as likely as its negative.
    """
    sample = _finite(differences)
    if len(sample) < 2 or not sample.any():
        return 1.0
    test = stats.permutation_test(
        (sample,),
        np.mean,
        permutation_type="samples",
        n_resamples=2**EXACT_UP_TO,
        alternative="two-sided",
        vectorized=True,
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    )
    return float(test.pvalue)


def least_p(seeds: int) -> float:
    """The smallest p that ``sign_flip_p`` can give: 2 of 2^S sign patterns. 0.0625 for five seeds."""
    return min(1.0, 2.0 / 2.0**seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, family-wise (Holm 1979): the i-th smallest of m times m - i + 1, made monotone, at most 1."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return adjusted.tolist()


def detectable(differences: Sequence[float] | np.ndarray, alpha: float = ALPHA, power: float = POWER) -> float:
    """The mean paired difference that S seeds would find with probability ``power`` if they scattered as these did.

    For planning the next comparison; what this one excludes its interval says.

    delta = lambda s / sqrt(S), where s is the standard deviation of the differences (S - 1 degrees of freedom) and
    lambda solves P(|T| > t_{1 - alpha/2, S-1}) = ``power`` for T noncentral t with S - 1 degrees of freedom and
    noncentrality lambda: a two-sided paired t test, one comparison, not corrected. s itself is uncertain at few seeds.

    Returns:
        In the unit of the differences; NaN for one seed, and where all are equal: s cannot be told from them.
    """
    sample = _finite(differences)
    count = len(sample)
    if _equal(sample):
        return float("nan")
    return _noncentrality(count - 1, alpha, power) * float(sample.std(ddof=1)) / count**0.5


def _noncentrality(freedom: int, alpha: float, power: float) -> float:
    """The noncentrality of a t with that power; by quadrature over the chi: scipy's nct gives NaN in its tails."""
    limit = float(stats.t.ppf(1 - alpha / 2, freedom))
    nodes, weights = np.polynomial.legendre.leggauss(400)
    scale = limit * np.sqrt(stats.chi2.ppf((nodes + 1) / 2, freedom) / freedom)  # the critical value, times s / sigma

    def lacking(noncentrality: float) -> float:
        rejected = stats.norm.cdf(noncentrality - scale) + stats.norm.cdf(-noncentrality - scale)
        return float(weights @ rejected / 2) - power

    return float(optimize.root_scalar(lacking, bracket=(0.0, 4 * limit + 4)).root)


def expanded(confidence: float, seeds: int) -> float:
    """The nominal confidence at which a percentile bootstrap of S values covers about ``confidence``.

    Percentile intervals of a mean are short by sqrt((S - 1) / S) and by the normal quantile in place of Student's: 75%
    for 3 values and 85% for 5 where 95% are asked. Hesterberg 2015 (arXiv 1411.5279, "expanded percentile") takes the
    quantiles Phi(-sqrt(S / (S - 1)) t). No interval reaches beyond the least and the largest value.
    """
    limit = float(stats.t.ppf((1 + confidence) / 2, seeds - 1)) * (seeds / (seeds - 1)) ** 0.5
    return 1 - 2 * float(stats.norm.cdf(-limit))


def _bootstrap(sample: np.ndarray, statistic, value: float) -> tuple[float, float]:
    if _equal(sample):
        return value, value
    interval = stats.bootstrap(
        (sample,),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=expanded(CONFIDENCE, len(sample)),
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _equal(sample: np.ndarray) -> bool:
    """Whether the values do not scatter, rounding aside."""
    return len(sample) < 2 or float(np.ptp(sample)) < 1e-12


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) == 0 or not np.isfinite(sample).all():
        raise UserError("seeds", sample.tolist(), "give one finite number per seed, at least one")
    return sample
