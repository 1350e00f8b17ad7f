"""Masking: a flagged rollout is not reinforced, but it stays in its group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_bool
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions.base import INTERVENTIONS, Intervention, Judged

if TYPE_CHECKING:
    from verl_grad_routing.detectors import Detector


@INTERVENTIONS.register("mask_advantage")
class MaskAdvantage(Intervention):
    """Positive advantages of flagged rollouts vanish; negative ones stay.

    Hard: ``A_i <- A_i (1 - m_i)`` where ``A_i > 0``, m the gate's flag. Soft: ``A_i <- A_i (1 - S_i)`` where
    ``A_i > 0``, S a score in [0, 1]; the gate is not asked. Group statistics are those of all rollouts, so a group's
    advantages no longer add up to zero. Ours, after GRIFT (arXiv 2604.16242), whose labels it was written for.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"hard": {"soft": False}, "soft": {"soft": True}}

    @dataclass(frozen=True)
    class Config:
        soft: bool = False  # by the detector's score, which must be in [0, 1], instead of the gate's flag

        def __post_init__(self) -> None:
            require_bool("soft", self.soft)

    config: Config

    def works_with(self, detector: type[Detector]) -> str | None:
        low, high = detector.score_range or (float("-inf"), float("inf"))
        if self.config.soft and (low < 0 or high > 1):
            return "a soft mask multiplies by 1 - score, and the detector's scores are not in [0, 1]"
        return super().works_with(detector)

    def verdicts(self, judged: Judged) -> Tensor:
        return judged.scores_B > 0.5 if self.config.soft else judged.flagged_B

    def advantages(self, advantages_BR: Tensor, judged: Judged) -> Tensor:
        weights_B = 1.0 - (_shares(judged.scores_B) if self.config.soft else judged.flagged_B.double())
        weights_B1 = weights_B.to(advantages_BR)[:, None]
        return torch.where(advantages_BR > 0, advantages_BR * weights_B1, advantages_BR)


def _shares(scores_B: Tensor) -> Tensor:
    bad_B = (scores_B < 0) | (scores_B > 1)
    if bad_B.any():
        fix = "a soft mask needs a detector whose scores are in [0, 1]; set soft=false to use the gate's flags"
        raise UserError("grad_routing.intervention.soft", float(scores_B[bad_B][0]), fix)
    return scores_B
