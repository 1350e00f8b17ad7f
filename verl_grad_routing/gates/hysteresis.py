"""A gate that another gate works behind, on in some steps and off in others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from verl_grad_routing.directions.checks import require_choice, require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates.base import GATES, Gate, GateDecision, PairStatistics
from verl_grad_routing.gates.separation import MEASURES
from verl_grad_routing.routing import Route


@GATES.register("hysteresis")
class Hysteresis(Gate):
    """Routes by an inner gate while the batch's scores fall into two groups; absorbs everything otherwise.

    With m the ``measure`` of the batch's scores: routing is off at first, turns on in the step in which m exceeds
    ``on``, stays on until m falls below ``off``, and so on. Two levels instead of one keep a batch that happens to be
    near the level from switching routing on and off from step to step. While it is off the inner gate still sees every
    batch, so its history and warm-up go on.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        # The gate that decides while routing is on: ``name`` and its settings.
        inner: Mapping[str, Any] = field(default_factory=lambda: {"name": "history_quantile"})
        measure: str = "between_share"  # between_share (Otsu's share of variance) or bimodality (Sarle's coefficient)
        on: float = 0.75  # routing turns on above this; 0.75 is a uniform distribution's share of variance
        off: float = 0.64  # and off below this; 0.64 is a normal distribution's

        def __post_init__(self) -> None:
            require_choice("measure", self.measure, sorted(MEASURES))
            require_number("on", self.on, 0, 1)
            require_number("off", self.off, 0, 1)
            if self.off > self.on:
                raise UserError("off", self.off, f"give at most on ({self.on:g})")
            if not isinstance(self.inner, Mapping):
                raise UserError("inner", self.inner, "give a gate: {name: ..., ...}")
            GATES.build(self.inner, "inner")  # refuse its bad settings here

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.inner = GATES.build(config.inner, "grad_routing.gate.inner")
        self.needs_pair_means = self.inner.needs_pair_means
        self._on = False

    @property
    def rescores(self) -> bool:
        return self.inner.rescores

    @property
    def remembered(self) -> int:
        return self.inner.remembered

    def _put(self, scores: np.ndarray) -> None:
        self.inner._put(scores)

    def _routes(self, scores: np.ndarray, step: int, pairs: PairStatistics) -> GateDecision:
        decision = self.inner.decide(torch.from_numpy(scores), step, pairs.means, pairs.scores)
        separation = MEASURES[self.config.measure](scores)
        self._on = separation >= self.config.off if self._on else separation > self.config.on
        metrics = {**decision.metrics, "gate/separation": separation, "gate/on": float(self._on)}
        if self._on:
            return GateDecision(decision.routes_B, metrics)
        absorbed = torch.full_like(decision.routes_B, int(Route.ABSORB))
        return GateDecision(absorbed, {**metrics, "gate/abstained": 1.0, "gate/capped": 0.0})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "on": self._on, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.inner.load_state_dict(state["inner"])
        self._on = state["on"]
