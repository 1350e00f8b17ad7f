"""Leakage: how much of the undesired data that nobody labelled reached what is deployed (SGTM, arXiv 2512.05648).

Definition G.1 there: the number of forget samples that a *standard* training run needs, retain data the same, to reach
the forget loss of the method's run, divided by the number of forget samples that the method's run saw unlabelled::

    leakage = |D_standard^forget| / |D_unlabeled^forget|      with equal forget loss

Standard runs with more and more undesired data are the baseline curve, read backwards by linear interpolation between
the two nearest of them. Filtering has leakage 1 by definition: what it misses is its standard run. The curve is a
function of a value only where that value is reached once; beyond the curve's ends the paper says nothing. Both are
refused here, never clipped.

Nothing in this module knows what is counted (tokens, rollouts) or measured (a loss that falls, a hack rate that rises);
``leakage_read`` says what they are in RL. Legend: R resamples, P baselines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_grad_routing.compare.paired import BOOTSTRAP_SEED, RESAMPLES, expanded
from verl_grad_routing.compare.statistics import CONFIDENCE
from verl_grad_routing.errors import UserError

BEYOND = {-math.inf: "below", math.inf: "above"}
"""Ends of an interval that lie beyond the curve, in words."""


@dataclass(frozen=True)
class Seen:
    """One run: undesired data that trained it (baseline) or that it saw unlabelled (method), and what came of it."""

    exposure: float
    value: float


Runs = Mapping[int, Seen]
"""Runs of one arm by seed."""


@dataclass(frozen=True)
class BaselineCurve:
    """What standard training makes of more and more undesired data, a straight line between neighbours.

    Attributes:
        exposures: Undesired data of each baseline, ascending, no two alike.
        values: What was measured of each.

    Raises:
        UserError: Fewer than two baselines, negative or equal exposures, numbers that are none.
    """

    exposures: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        points = list(zip(self.exposures, self.values, strict=True))
        if len(points) < 2:
            raise UserError("baseline", len(points), "a curve needs at least two runs with different undesired data")
        for exposure, value in points:
            if not (math.isfinite(exposure) and math.isfinite(value)) or exposure < 0:
                raise UserError("baseline", (exposure, value), "give amounts of at least 0 and finite values")
        for before, after in zip(self.exposures, self.exposures[1:], strict=False):
            if before >= after:
                fix = "amounts must ascend: give each amount once, the mean of its runs"
                raise UserError("baseline", (before, after), fix)

    @classmethod
    def of(cls, runs: Sequence[Seen]) -> BaselineCurve:
        """The curve through ``runs``, in any order."""
        ordered = sorted(runs, key=lambda run: run.exposure)
        return cls(tuple(run.exposure for run in ordered), tuple(run.value for run in ordered))

    @property
    def turns_back(self) -> tuple[float, float] | None:
        """The first two neighbouring exposures between which it runs against its own direction; None when it never."""
        rises = self.values[-1] > self.values[0]
        for index in range(len(self.values) - 1):
            step = self.values[index + 1] - self.values[index]
            if (step < 0) if rises else (step > 0):
                return self.exposures[index], self.exposures[index + 1]
        return None

    def equivalent(self, value: float) -> float:
        """``|D_standard^forget|``: the undesired data with which standard training reaches ``value``.

        Raises:
            UserError: ``value`` lies beyond the curve, or the curve reaches it more than once.
        """
        exposure_1P, value_1P = (np.array([row], dtype=np.float64) for row in (self.exposures, self.values))
        first, last = (float(found[0]) for found in _crossings(exposure_1P, value_1P, np.array([float(value)])))
        if math.isnan(first):
            fix = "the baseline curve ends at the value it starts with, so it tells no amount"
            raise UserError("leakage", value, fix)
        if math.isinf(first):
            which, amount = (0, "smallest") if first < 0 else (-1, "largest")
            fix = (
                f"beyond the baseline with the {amount} amount ({self.exposures[which]:g}: {self.values[which]:g}), so "
                f"no equivalent amount is known; {'it leaks less than can be told' if first < 0 else 'add a baseline'}"
            )
            raise UserError("leakage", value, fix)
        if first != last:
            fix = f"the baseline curve has this value from {first:g} to {last:g}: more seeds, or other amounts between"
            raise UserError("leakage", value, fix)
        return first


def leakage(curve: BaselineCurve, value: float, undiscovered: float) -> float:
    """``|D_standard^forget| / |D_unlabeled^forget|`` of a run (definition G.1).

    Args:
        curve: Of standard runs with the same retain data.
        value: What was measured of the run after ablation, as of the baselines.
        undiscovered: Undesired data that the run saw unlabelled, in the unit of the curve's exposures.

    Returns:
        0: nothing leaked; 1: as much as in standard training on the undiscovered data, which is what filtering leaks.
        More than 1 is possible: labelled data may have leaked too.

    Raises:
        UserError: Nothing was undiscovered, or the curve tells no amount for ``value``.
    """
    if not (math.isfinite(undiscovered) and undiscovered > 0):
        fix = "all undesired data were labelled, so there is nothing that could leak unlabelled"
        raise UserError("undiscovered", undiscovered, fix)
    return curve.equivalent(value) / undiscovered


@dataclass(frozen=True)
class Leak:
    """The leakage of one arm: of the means over seeds, with an interval over seeds.

    Attributes:
        arm: Its name.
        seeds: Seeds that the arm shares with every baseline.
        undiscovered: Undesired data seen unlabelled, mean over seeds.
        value: What was measured, mean over seeds.
        equivalent: Undesired data with which standard training reaches that value; None where ``why`` says why not.
        leakage: Their ratio, or None.
        low: Lower end of the 95% bootstrap interval over seeds (``paired.expanded``); minus infinity where it lies
            beyond the curve; None of a single seed.
        high: Upper end, likewise.
        why: One line, where there is no leakage.
    """

    arm: str
    seeds: int
    undiscovered: float
    value: float
    equivalent: float | None = None
    leakage: float | None = None
    low: float | None = None
    high: float | None = None
    why: str | None = None

    def __str__(self) -> str:
        shown = "–" if self.leakage is None else f"{self.leakage:.3f}"
        if self.low is None or self.high is None:
            return shown
        ends = (BEYOND.get(end, f"{end:.3f}") for end in (self.low, self.high))
        return f"{shown} [{', '.join(ends)}]"

    def as_dict(self) -> dict[str, Any]:
        """Plain data; infinities, which JSON lacks, as the words ``below`` and ``above``."""
        own = {key: getattr(self, key) for key in self.__dataclass_fields__}
        return own | {key: BEYOND.get(own[key], own[key]) for key in ("low", "high") if own[key] is not None}


def leaks(baselines: Mapping[str, Runs], arms: Mapping[str, Runs]) -> tuple[BaselineCurve, list[Leak]]:
    """The baseline curve, means over seeds, and every arm's leakage against it.

    Raises:
        UserError: Baselines that make no curve, or an arm that shares no seed with all of them.
    """
    shared = set.intersection(*(set(runs) for runs in baselines.values())) if baselines else set()
    if not shared:
        raise UserError("baseline", sorted(baselines), "these arms have no seed in common; finish their cells")
    curve = BaselineCurve.of([_mean(runs, sorted(shared)) for runs in baselines.values()])
    return curve, [_leak(arm, runs, baselines, shared & set(runs)) for arm, runs in arms.items()]


def _leak(arm: str, runs: Runs, baselines: Mapping[str, Runs], shared: set[int]) -> Leak:
    if not shared:
        raise UserError(arm, sorted(runs), "none of its seeds is one that all baselines have; finish those cells")
    seeds = sorted(shared)
    seen = _mean(runs, seeds)
    curve = BaselineCurve.of([_mean(others, seeds) for others in baselines.values()])
    low, high = _interval(runs, baselines, seeds) if len(seeds) > 1 and seen.exposure > 0 else (None, None)
    try:
        ratio = leakage(curve, seen.value, seen.exposure)
    except UserError as error:
        return Leak(arm, len(seeds), seen.exposure, seen.value, low=low, high=high, why=error.fix)
    return Leak(arm, len(seeds), seen.exposure, seen.value, ratio * seen.exposure, ratio, low, high)


def _mean(runs: Runs, seeds: Sequence[int]) -> Seen:
    return Seen(*(float(np.mean([getattr(runs[seed], key) for seed in seeds])) for key in ("exposure", "value")))


def _interval(runs: Runs, baselines: Mapping[str, Runs], seeds: Sequence[int]) -> tuple[float, float]:
    """Seeds drawn with replacement, the same ones for the arm and every baseline, whose runs are paired by seed.

    Where a resampled curve reaches the value more than once the lower end counts its first and the upper end its last
    amount, and beyond the curve they count as infinite: the interval is rather too wide than too narrow.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn_RS = rng.integers(len(seeds), size=(RESAMPLES, len(seeds)))

    def resampled(of: Runs, key: str) -> np.ndarray:
        return np.array([getattr(of[seed], key) for seed in seeds], dtype=np.float64)[drawn_RS].mean(axis=1)

    curves = [np.stack([resampled(o, key) for o in baselines.values()], axis=1) for key in ("exposure", "value")]
    order = np.argsort(curves[0], axis=1, kind="stable")
    exposure_RP, value_RP = (np.take_along_axis(rows, order, axis=1) for rows in curves)
    first_R, last_R = _crossings(exposure_RP, value_RP, resampled(runs, "value"))
    unlabelled_R = resampled(runs, "exposure")
    unknown_R = np.isnan(first_R) | (unlabelled_R == 0)
    divided_R = np.where(unlabelled_R == 0, 1.0, unlabelled_R)
    tail = (1 - expanded(CONFIDENCE, len(seeds))) / 2
    low = np.quantile(np.where(unknown_R, -np.inf, first_R / divided_R), tail, method="lower")
    high = np.quantile(np.where(unknown_R, np.inf, last_R / divided_R), 1 - tail, method="higher")
    return float(low), float(high)


def _crossings(exposure_RP: np.ndarray, value_RP: np.ndarray, value_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last exposure at which each curve has the value, float64 [R] each.

    Minus infinity on the side of the smallest exposure where the curve does not get there, plus infinity on the other;
    not a number where the curve ends at the value it starts with and never gets there.
    """
    e0, e1, v0, v1 = exposure_RP[:, :-1], exposure_RP[:, 1:], value_RP[:, :-1], value_RP[:, 1:]
    target = value_R[:, None]
    inside = (np.minimum(v0, v1) <= target) & (target <= np.maximum(v0, v1))
    flat = v0 == v1
    share = np.where(flat, 0.0, (target - v0) / np.where(flat, 1.0, v1 - v0))
    # by the nearer end, so that a baseline's own value gives its own exposure exactly
    at = np.where(share <= 0.5, e0 + share * (e1 - e0), e1 - (1 - share) * (e1 - e0))
    first_R = np.where(inside, at, np.inf).min(axis=1)
    last_R = np.where(inside, np.where(flat, e1, at), -np.inf).max(axis=1)
    rises_R = np.sign(value_RP[:, -1] - value_RP[:, 0])
    side_R = np.where(value_R < value_RP.min(axis=1), -rises_R, rises_R)
    beyond_R = np.where(rises_R == 0, np.nan, np.where(side_R > 0, np.inf, -np.inf))
    found_R = inside.any(axis=1)
    return np.where(found_R, first_R, beyond_R), np.where(found_R, last_R, beyond_R)
