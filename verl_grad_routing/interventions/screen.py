"""Rejection: a flagged rollout teaches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_int
from verl_grad_routing.interventions.base import INTERVENTIONS, Intervention, Judged
from verl_grad_routing.interventions.groups import group_of


@INTERVENTIONS.register("screen")
class Screen(Intervention):
    """Flagged rollouts leave the step; group statistics are those of the kept.

    ``A_i = (R_i - mean_kept) / (std_kept + eps)`` for kept rollouts, nothing for the others: the screening baseline of
    'Steering RL training: benchmarking interventions against reward hacking', and GRIFT's labels as a rejection filter.
    Unlike that study's code, a rejected rollout also leaves the response mask, so KL, entropy and token denominators do
    not see it. A group with fewer than ``min_kept`` kept rollouts has no baseline worth the name and leaves as a whole.
    """

    needs_groups: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        min_kept: int = 2  # groups with fewer kept rollouts leave the step

        def __post_init__(self) -> None:
            require_int("min_kept", self.min_kept, 1)

    config: Config

    def rejected(self, judged: Judged) -> Tensor:
        group_B, groups = group_of(judged.uids)
        kept_G = torch.bincount(group_B[~judged.flagged_B], minlength=groups)
        return judged.flagged_B | (kept_G[group_B] < self.config.min_kept)
