"""A threshold where the scores themselves fall apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_grad_routing.directions.checks import require_bool, require_int, require_number
from verl_grad_routing.gates.base import GATES, PairStatistics
from verl_grad_routing.gates.history import History, check_rescore
from verl_grad_routing.gates.separation import bimodality, otsu_split
from verl_grad_routing.gates.thresholds import ThresholdConfig, ThresholdGate, Thresholds


@GATES.register("otsu")
class Otsu(ThresholdGate):
    """Otsu's cut of the scores into two classes, if there are two.

    ROUTE is the upper class of the cut with the largest variance between the classes (Otsu 1979; see
    ``separation.otsu_split``), KEEP the lower class with ``keep``, else ABSORB. Equal scores are never cut apart.

    Any scores have a best cut, so a **guard** decides whether it means something: the gate abstains (all ABSORB) when
    the variance between the classes is a smaller share of the total than ``min_between_share``, or the bimodality
    coefficient is smaller than ``min_bimodality``. Defaults are the values of a uniform distribution, 0.75 and 5/9
    (a normal one has 0.64 and 0.33): what is no more two-sided than that is not cut. 0 switches a guard off.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ThresholdConfig):
        window: int = 1  # scores that are cut: the last so many, never fewer than the batch; 1: the batch, 0: the run
        rescore: bool = False  # score what is remembered again when the direction has been refreshed; needs a window
        keep: bool = False  # the lower class is kept
        min_between_share: float = 0.75  # abstain below this share of variance between the classes
        min_bimodality: float = 5 / 9  # abstain below this bimodality coefficient

        def __post_init__(self) -> None:
            super().__post_init__()
            require_int("window", self.window, 0)
            check_rescore(self.rescore, self.window)
            require_bool("keep", self.keep)
            require_number("min_between_share", self.min_between_share, 0, 1)
            require_number("min_bimodality", self.min_bimodality, 0, 1)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._history = History(config.window)

    def _thresholds(self, scores: np.ndarray, pairs: PairStatistics) -> Thresholds:
        del pairs
        population = self._history.take(scores)
        split, coefficient = otsu_split(population), bimodality(population)
        share = split.between_share if split else 0.0
        details = {"gate/between_share": share, "gate/bimodality": coefficient}
        if split is None:
            return Thresholds(population=len(population), abstain=True, details=details)
        below = split.lowest_high if self.config.keep else -math.inf
        abstain = share < self.config.min_between_share or coefficient < self.config.min_bimodality
        return Thresholds(split.highest_low, below, len(population), abstain, details)

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
