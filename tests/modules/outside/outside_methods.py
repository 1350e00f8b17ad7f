"""What another package brings along: a detector and an intervention of its own, in one file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors import DETECTORS, BatchView, Detector, Signal
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions import INTERVENTIONS, Intervention, Judged


@DETECTORS.register("repetition")
class Repetition(Detector):
    """Share of the response's characters that repeat the one before: a weak judge that reads texts."""

    signal: ClassVar[Signal] = Signal.monitor
    score_range: ClassVar[tuple[float, float] | None] = (0, 1)

    @dataclass(frozen=True)
    class Config:
        least: int = 2  # a shorter response has score 0

        def __post_init__(self) -> None:
            if self.least < 2:
                raise UserError("least", self.least, "give at least 2 characters")

    config: Config

    def score(self, view: BatchView) -> Tensor:
        return torch.tensor([self._share(text) for text in view.responses or ()], dtype=torch.float64)

    def _share(self, text: str) -> float:
        if len(text) < self.config.least:
            return 0.0
        return sum(a == b for a, b in itertools.pairwise(text)) / (len(text) - 1)


@INTERVENTIONS.register("soften")
class Soften(Intervention):
    """Positive advantages of flagged rollouts are multiplied by ``factor``."""

    @dataclass(frozen=True)
    class Config:
        factor: float = 0.5

    config: Config

    def advantages(self, advantages_BR: Tensor, judged: Judged) -> Tensor:
        softened_B = judged.flagged_B.to(advantages_BR.device)
        return torch.where(softened_B[:, None] & (advantages_BR > 0), advantages_BR * self.config.factor, advantages_BR)
