"""Interleaved A/B timing and the interval of its median ratio.

A machine's speed drifts, so two variants are timed in turns (A, B, A, B, …) and compared pair by pair: the statistic is
the median of the paired ratios, its interval the percentile bootstrap over pairs (Efron 1979). On a machine that is
shared its speed also jumps, by half and for seconds: a pair during which it did compares two machines, and is measured
again. Whether it did, a workload tells that has nothing to do with either variant (:func:`spin`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from verl_grad_routing.errors import UserError

STEADY = 1.1  # fastest to slowest spin of a pair that counts
AGAIN = 4  # times as many pairs as wanted are measured at most
UNDECIDED = 4  # times as many pairs are kept where the first ones leave open on which side of its bound a ratio is
SPIN = 60_000  # additions, some milliseconds


@dataclass(frozen=True)
class RatioInterval:
    """Median of the paired ratios a/b with its bootstrap interval; below 1, A is the cheaper one."""

    median: float
    low: float
    high: float
    pairs: int
    confidence: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def spin() -> float:
    """Seconds that a fixed loop takes now; the better of two, for one may be interrupted."""
    return min(_spin(), _spin())


def _spin() -> float:
    started, total = time.perf_counter(), 0
    for number in range(SPIN):
        total += number
    return time.perf_counter() - started


def interleave(
    measure_a: Callable[[], float],
    measure_b: Callable[[], float],
    repeats: int,
    warmup: int = 3,
    speed: Callable[[], float] = spin,
) -> tuple[list[float], list[float]]:
    """Call both in turns, A first, and collect what they return.

    Args:
        measure_a, measure_b: Run the variant once and return its cost (seconds, say).
        repeats: Number of pairs kept.
        warmup: Number of pairs run first and dropped.
        speed: Seconds of a fixed workload, called before, between and after both. A pair during which these differ by
            more than ``STEADY`` is dropped and measured again, up to ``AGAIN * repeats`` pairs in all; if there are too
            few steady pairs then, the steadiest of the others fill up, and a line says how many.
    """
    if repeats < 1 or warmup < 0:
        raise UserError("repeats", repeats, "give at least one pair")
    for _ in range(warmup):
        measure_a()
        measure_b()
    pairs: list[tuple[float, float, float]] = []  # unsteadiness, A, B
    while sum(pair[0] <= STEADY for pair in pairs) < repeats and len(pairs) < AGAIN * repeats:
        speeds = [speed()]
        a = measure_a()
        speeds.append(speed())
        b = measure_b()
        speeds.append(speed())
        pairs.append((max(speeds) / min(speeds), a, b))
    kept = sorted(pairs, key=lambda pair: max(pair[0], STEADY))[:repeats]  # stable: steady ones in their order
    if unsteady := sum(pair[0] > STEADY for pair in kept):
        print(f"the machine changed speed during {unsteady} of these {repeats} pairs: measure again later", flush=True)
    return [a for _, a, _ in kept], [b for _, _, b in kept]


def measure_against(
    bound: float, measure_a: Callable[[], float], measure_b: Callable[[], float], repeats: int, **settings: Any
) -> tuple[RatioInterval, list[float], list[float]]:
    """The ratio A/B with as many pairs as it takes to tell on which side of ``bound`` it is, within reason.

    :func:`interleave` measures ``repeats`` pairs. If the bound lies in their interval, it goes on to ``UNDECIDED``
    times as many, and the interval is that of all of them. There is no third look, so a ratio at its bound passes for
    one within it in 5 of 100 cases at most (2.5 a look).

    Args:
        bound: Of the ratio's interval.
        measure_a, measure_b, repeats: Of :func:`interleave`.
        settings: More of its arguments.

    Returns:
        The ratio and both sides' samples.
    """
    a, b = interleave(measure_a, measure_b, repeats, **settings)
    ratio = ratio_interval(a, b)
    if not ratio.low <= bound < ratio.high:
        return ratio, a, b
    more_a, more_b = interleave(measure_a, measure_b, (UNDECIDED - 1) * repeats, **{**settings, "warmup": 0})
    a, b = a + more_a, b + more_b
    return ratio_interval(a, b), a, b


def ratio_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> RatioInterval:
    """Median of ``a[i] / b[i]`` and its percentile bootstrap interval over pairs.

    Raises:
        UserError: The samples are empty, of unequal length, or not finite and positive.
    """
    a_N, b_N = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_N.shape != b_N.shape or a_N.ndim != 1 or not a_N.size:
        raise UserError("samples", (a_N.shape, b_N.shape), "give two sequences of one length, at least one pair")
    if not all(np.isfinite(samples).all() and (samples > 0).all() for samples in (a_N, b_N)):
        raise UserError("samples", "not finite and positive", "measure again; a cost is a positive number")
    ratios_N = a_N / b_N
    draws = np.random.default_rng(seed).integers(0, ratios_N.size, size=(resamples, ratios_N.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(ratios_N[draws], axis=1), [tail, 1 - tail])
    return RatioInterval(float(np.median(ratios_N)), float(low), float(high), int(ratios_N.size), confidence)
