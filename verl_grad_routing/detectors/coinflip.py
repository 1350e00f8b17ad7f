"""Control: scores that know nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.base import DETECTORS, BatchView, Detector, Signal
from verl_grad_routing.detectors.draws import uniform
from verl_grad_routing.directions.checks import require_int


@DETECTORS.register("coinflip")
class Coinflip(Detector):
    """A uniform number in [0, 1) for each rollout: the first 53 bits of SHA-256 of seed, step and name.

    With the same gate as another detector it routes the same share of rollouts, drawn by lot.
    """

    signal: ClassVar[Signal] = Signal.none
    score_range: ClassVar[tuple[float, float] | None] = (0, 1)

    @dataclass(frozen=True)
    class Config:
        seed: int | None = None  # null: the run's seed

        def __post_init__(self) -> None:
            if self.seed is not None:
                require_int("seed", self.seed, 0)

    config: Config

    def score(self, view: BatchView) -> Tensor:
        seed = view.seed if self.config.seed is None else self.config.seed
        return torch.tensor([uniform(seed, view.step, name) for name in view.drawn_by], dtype=torch.float64)
