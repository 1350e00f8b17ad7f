"""Thresholds that the configuration gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from verl_grad_routing.directions.checks import require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates.base import GATES, PairStatistics
from verl_grad_routing.gates.thresholds import ThresholdConfig, ThresholdGate, Thresholds


@GATES.register("threshold")
class FixedThreshold(ThresholdGate):
    """ROUTE above one fixed score, KEEP below another (both strictly), ABSORB between."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ThresholdConfig):
        route_above: float | None = None  # null: nothing is routed
        keep_below: float | None = None  # null: nothing is kept

        def __post_init__(self) -> None:
            super().__post_init__()
            for field in ("route_above", "keep_below"):
                if getattr(self, field) is not None:
                    require_number(field, getattr(self, field))
            if self.route_above is not None and self.keep_below is not None and self.keep_below > self.route_above:
                raise UserError("keep_below", self.keep_below, f"give at most route_above ({self.route_above:g})")

    config: Config

    def _thresholds(self, scores: np.ndarray, pairs: PairStatistics) -> Thresholds:
        del scores, pairs
        above, below = self.config.route_above, self.config.keep_below
        return Thresholds(math.inf if above is None else above, -math.inf if below is None else below)
