"""Control: the grader's own facts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.base import DETECTORS, BatchView, Detector, NoConfig, Signal
from verl_grad_routing.errors import UserError


@DETECTORS.register("oracle")
class Oracle(Detector):
    """Score 1 for a hack, -1 for a true solution, 0 for neither: the facts ``hack`` minus ``solve``.

    An upper bound and nothing else: a method that could know this would not need routing.
    """

    signal: ClassVar[Signal] = Signal.oracle
    score_range: ClassVar[tuple[float, float] | None] = (-1, 1)
    Config = NoConfig

    def score(self, view: BatchView) -> Tensor:
        facts = view.facts or {}
        for fact in ("hack", "solve"):
            if fact not in facts:
                raise UserError("batch.facts", sorted(facts), f"the oracle needs the grader's fact {fact!r}")
        return facts["hack"].to(torch.float64) - facts["solve"].to(torch.float64)
