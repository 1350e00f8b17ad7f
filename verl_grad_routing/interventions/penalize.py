"""Penalty: a flagged rollout is rewarded less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_number
from verl_grad_routing.interventions.base import INTERVENTIONS, Intervention, Judged


@INTERVENTIONS.register("penalize")
class Penalize(Intervention):
    """``r_i - penalty m_i``, or no reward at all where flagged.

    With ``penalty`` a number, the penalty baseline of 'Steering RL training: benchmarking interventions against reward
    hacking' (3 there, for a reward of 3). With ``penalty: null`` reward requires a silent monitor, ``r_i (1 - m_i)``:
    our reading of Baker et al., arXiv 2503.11926.
    """

    @dataclass(frozen=True)
    class Config:
        penalty: float | None = None  # taken off a flagged rollout's reward; null: a flagged rollout has reward 0

        def __post_init__(self) -> None:
            if self.penalty is not None:
                require_number("penalty", self.penalty, 0)

    config: Config

    def rewards(self, rewards_B: Tensor, judged: Judged) -> Tensor:
        flagged_B = judged.flagged_B
        if self.config.penalty is None:
            return torch.where(flagged_B, torch.zeros_like(rewards_B), rewards_B)
        return rewards_B - self.config.penalty * flagged_B.to(rewards_B.dtype)
