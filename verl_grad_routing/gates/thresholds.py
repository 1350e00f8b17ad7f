"""Gates with two thresholds, and what they share: warm-up, ramp, abstention and a cap on the routed share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from verl_grad_routing.directions.checks import require_int, require_number
from verl_grad_routing.gates.base import Gate, GateDecision, PairStatistics
from verl_grad_routing.routing import Route


class Thresholds(NamedTuple):
    """Scores strictly above ``above`` are ROUTE, strictly below ``below`` KEEP (never both)."""

    above: float = math.inf
    below: float = -math.inf
    population: int = 0  # number of scores that the thresholds were computed from
    abstain: bool = False  # nothing may be routed or kept by these thresholds; they are reported all the same
    details: Mapping[str, float] = MappingProxyType({})  # further metrics of how they were found

    def metrics(self, warmup: bool = False, abstained: bool = False, capped: float = 0.0) -> dict[str, float]:
        """The metrics of a decision; an infinite threshold is NaN."""
        return {
            "gate/threshold_route": self.above if math.isfinite(self.above) else math.nan,
            "gate/threshold_keep": self.below if math.isfinite(self.below) else math.nan,
            "gate/history_size": float(self.population),
            "gate/warmup": float(warmup),
            "gate/abstained": float(abstained),
            "gate/capped": capped,
            **self.details,
        }


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """What all gates with thresholds have in common."""

    max_route_share: float = 1.0  # at most floor(this x B) rollouts of a batch are routed, the highest scores
    warmup_steps: int = 0  # steps 1..warmup_steps are all ABSORB (their scores still enter the history)
    # Steps after the warm-up over which the routed share grows: in the k-th of them, of n rollouts above the threshold
    # the floor(k n / ramp_steps) highest are routed, the others are ABSORB. KEEP has no ramp. 0: all from the first.
    ramp_steps: int = 0
    abstain_std: float = 0.0  # all ABSORB when the batch's scores have a smaller standard deviation than this

    def __post_init__(self) -> None:
        require_number("max_route_share", self.max_route_share, 0, 1)
        require_int("warmup_steps", self.warmup_steps, 0)
        require_int("ramp_steps", self.ramp_steps, 0)
        require_number("abstain_std", self.abstain_std, 0)


class ThresholdGate(Gate):
    """Thresholds with a warm-up, a ramp, an abstention rule and a cap on the routed share of each batch.

    Rollouts over the cap or the ramp are ABSORB; among equal scores there, rows that come earlier are routed. The
    trainer gives rows in an order drawn by their names (``BatchView.tie_order``).
    """

    config: ThresholdConfig

    @abstractmethod
    def _thresholds(self, scores: np.ndarray, pairs: PairStatistics) -> Thresholds:
        """Thresholds for this batch. A gate with a history of its own takes the scores into it here."""

    def _routes(self, scores: np.ndarray, step: int, pairs: PairStatistics) -> GateDecision:
        thresholds = self._thresholds(scores, pairs)
        warmup = step <= self.config.warmup_steps
        ramp = 0.0 if warmup else self._ramp(step)
        abstained = not warmup and (thresholds.abstain or float(scores.std()) < self.config.abstain_std)
        routes = np.full(len(scores), int(Route.ABSORB), dtype=np.int64)
        capped = 0.0
        if not (warmup or abstained):
            highest_first = np.argsort(-scores, kind="stable")
            flagged = highest_first[scores[highest_first] > thresholds.above]
            allowed = min(floor_share(self.config.max_route_share, len(scores)), floor_share(ramp, len(flagged)))
            capped = (len(flagged) - allowed) / len(scores)
            routes[scores < thresholds.below] = int(Route.KEEP)
            routes[flagged[:allowed]] = int(Route.ROUTE)
        metrics = {**thresholds.metrics(warmup, abstained, capped), "gate/ramp": ramp}
        return GateDecision(torch.from_numpy(routes), metrics)

    def _ramp(self, step: int) -> float:
        """Share of the rollouts above the threshold that may be routed at ``step``."""
        ramp_steps = self.config.ramp_steps
        return min((step - self.config.warmup_steps) / ramp_steps, 1.0) if ramp_steps else 1.0


def floor_share(share: float, rows: int) -> int:
    """``floor(share * rows)``, forgiving rounding errors such as 0.29 * 100 = 28.999999999999996."""
    return math.floor(round(share * rows, 6))


def ceil_share(share: float, rows: int) -> int:
    """``ceil(share * rows)``, forgiving rounding errors such as 0.07 * 100 = 7.000000000000001."""
    return math.ceil(round(share * rows, 6))
