"""Rejection: a flagged rollout teaches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_bool, require_int, require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions.base import INTERVENTIONS, Intervention, Judged
from verl_grad_routing.interventions.groups import group_of


@INTERVENTIONS.register("screen")
class Screen(Intervention):
    """Flagged rollouts leave the step; group statistics are those of the kept.

    ``A_i = (R_i - mean_kept) / (std_kept + eps)`` for kept rollouts, nothing for the others: the screening baseline of
    'Steering RL training: benchmarking interventions against reward hacking', and GRIFT's labels as a rejection filter.
    Unlike that study's code, a rejected rollout also leaves the response mask, so KL, entropy and token denominators do
    not see it. A group with fewer than ``min_kept`` kept rollouts has no baseline worth the name and leaves as a whole.

    ``strict`` screening rejects only what was also paid for, a hack that worked; loose screening, the default, rejects
    attempts too. (The study's strict monitor knows the truth and spares right answers that contain an attempt as well;
    here the proxy reward alone is read.)
    """

    needs_groups: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        min_kept: int = 2  # groups with fewer kept rollouts leave the step
        strict: bool = False  # only flagged rollouts with a proxy reward above paid_above leave
        paid_above: float = 0.0  # see strict

        def __post_init__(self) -> None:
            require_int("min_kept", self.min_kept, 1)
            require_bool("strict", self.strict)
            require_number("paid_above", self.paid_above)

    config: Config

    def rejected(self, judged: Judged) -> Tensor:
        group_B, groups = group_of(judged.uids)
        flagged_B = judged.flagged_B
        if self.config.strict:
            if judged.rewards_B is None:
                fix = "strict screening reads proxy rewards, and the batch has none; set false"
                raise UserError("grad_routing.intervention.strict", True, fix)
            flagged_B = flagged_B & (judged.rewards_B.to(flagged_B.device) > self.config.paid_above)
        kept_G = torch.bincount(group_B[~flagged_B], minlength=groups)
        return flagged_B | (kept_G[group_B] < self.config.min_kept)
