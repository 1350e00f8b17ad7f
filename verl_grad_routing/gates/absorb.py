"""The gate that routes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from verl_grad_routing.gates.base import GATES, Gate, GateDecision, PairStatistics
from verl_grad_routing.gates.thresholds import Thresholds
from verl_grad_routing.routing import Route


@GATES.register("absorb_all")
class AbsorbAll(Gate):
    """Every rollout trains both blocks: the control that splits the adapter and routes nothing."""

    @dataclass(frozen=True)
    class Config:
        pass

    def _routes(self, scores: np.ndarray, step: int, pairs: PairStatistics) -> GateDecision:
        del step, pairs
        return GateDecision(torch.full((len(scores),), int(Route.ABSORB)), Thresholds().metrics())
