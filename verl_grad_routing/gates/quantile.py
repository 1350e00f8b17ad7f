"""Shares of the batch, or of the run so far.

**Shares.** ``route: 0.75, keep: 0.25`` over a population of N scores (of the batch, or of the run so far with this
batch in it) means: a rollout with score s is

- ROUTE when at most ``floor(0.75 N)`` scores of the population are >= s,
- KEEP when at most ``floor(0.25 N)`` scores of the population are <= s,
- ABSORB otherwise.

Counts include the rollout itself and all its ties, so ties that straddle a boundary are all ABSORB, and a batch of
equal scores routes and keeps nothing. Nothing is interpolated, and as ``route + keep <= 1`` no score is both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_grad_routing.directions.checks import require_int, require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates.base import GATES, PairStatistics
from verl_grad_routing.gates.history import History, check_rescore
from verl_grad_routing.gates.thresholds import ThresholdConfig, ThresholdGate, Thresholds, floor_share


@dataclass(frozen=True, kw_only=True)
class QuantileConfig(ThresholdConfig):
    """Shares of a population of scores."""

    route: float = 0.75  # share of the population, from the top, that is routed
    keep: float = 0.25  # share of the population, from the bottom, that is kept

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("route", self.route, 0, 1)
        require_number("keep", self.keep, 0, 1)
        if self.route + self.keep > 1 + 1e-9:
            raise UserError("keep", self.keep, f"route + keep may be at most 1, so give at most {1 - self.route:g}")


@GATES.register("batch_quantile")
class BatchQuantile(ThresholdGate):
    """Shares of the current batch; the module's docstring gives their exact meaning."""

    Config = QuantileConfig
    config: QuantileConfig

    def _thresholds(self, scores: np.ndarray, pairs: PairStatistics) -> Thresholds:
        del pairs
        return share_thresholds(scores, self.config.route, self.config.keep)


@GATES.register("history_quantile")
class HistoryQuantile(ThresholdGate):
    """Shares of all scores of the run so far, the current batch included.

    When the policy moves towards the unwanted behaviour, more than ``route`` of a batch is routed: the thresholds stay
    where the run's scores have been. Scores are kept as they were made unless ``rescore`` is set.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantileConfig):
        # Only the last so many rollouts count (never fewer than the current batch). 0: the whole run, 8 bytes each.
        window: int = 0
        rescore: bool = False  # score what is remembered again when the direction has been refreshed; needs a window

        def __post_init__(self) -> None:
            super().__post_init__()
            require_int("window", self.window, 0)
            check_rescore(self.rescore, self.window)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._history = History(config.window)

    def _thresholds(self, scores: np.ndarray, pairs: PairStatistics) -> Thresholds:
        del pairs
        return share_thresholds(self._history.take(scores), self.config.route, self.config.keep)

    @property
    def remembered(self) -> int:
        return len(self._history)

    def _put(self, scores: np.ndarray) -> None:
        self._history.put(scores)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "history": self._history.to_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._history.load_state(state["history"])


def share_thresholds(population: np.ndarray, route: float, keep: float) -> Thresholds:
    """Thresholds that single out the top ``route`` and the bottom ``keep`` share of ``population``.

    The upper one is the (floor(route N) + 1)-th highest score, so what ties with it is not routed; likewise from below.
    """
    ordered, size = np.sort(population), len(population)
    routed, kept = floor_share(route, size), floor_share(keep, size)
    above = float(ordered[size - 1 - routed]) if routed < size else -math.inf
    return Thresholds(above, float(ordered[kept]) if kept < size else math.inf, size)
