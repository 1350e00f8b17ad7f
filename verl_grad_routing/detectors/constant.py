"""No detector at all."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.base import DETECTORS, BatchView, Detector, NoConfig, Signal


@DETECTORS.register("constant")
class Constant(Detector):
    """Score 0 for every rollout, for runs that route nothing."""

    signal: ClassVar[Signal] = Signal.none
    tells_apart: ClassVar[bool] = False
    score_range: ClassVar[tuple[float, float] | None] = (0, 0)
    Config = NoConfig

    def score(self, view: BatchView) -> Tensor:
        return torch.zeros(len(view.keys), dtype=torch.float64)
