"""Advantage modification: what scores high within its group is rewarded less, before advantages are normalised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_choice, require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions.base import INTERVENTIONS, Intervention, Judged
from verl_grad_routing.interventions.groups import group_z_scores


def additive(rewards_B: Tensor, z_B: Tensor, alpha: float) -> Tensor:
    """``r - alpha max(z, 0)``."""
    return rewards_B - alpha * z_B.clamp(min=0)


def multiplicative(rewards_B: Tensor, z_B: Tensor, alpha: float) -> Tensor:
    """``r (1 - alpha sigmoid(z) [z > 0])``; with alpha = 2 that is ``-r tanh(z / 2)`` where z > 0: the sign turns."""
    if (rewards_B < 0).any():
        fix = "the multiplicative form would reward what has a negative reward; set form=additive"
        raise UserError("grad_routing.intervention.form", float(rewards_B[rewards_B < 0][0]), fix)
    return rewards_B * (1 - alpha * torch.sigmoid(z_B) * (z_B > 0))


FORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"additive": additive, "multiplicative": multiplicative}


@INTERVENTIONS.register("modify_reward")
class ModifyReward(Intervention):
    """Advantage modification (When Reward Hacking Rebounds, arXiv 2604.01476, Eqs. 4-5).

    ``z_i = (s_i - group mean) / max(group std, floor)`` of the detector's scores, unbiased standard deviation, then the
    outcome reward becomes ``additive`` or ``multiplicative`` of it, once a rollout, and verl's own estimator does the
    rest. The gate is not asked. The paper writes the equations for tokens; on the outcome, as here, the penalty does
    not grow with length. The floor is in units of the score.
    """

    needs_groups: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {form: {"form": form} for form in FORMS}

    @dataclass(frozen=True)
    class Config:
        form: str = "multiplicative"  # additive: r - alpha max(z, 0); multiplicative: r (1 - alpha sigmoid(z) [z > 0])
        alpha: float = 2.0  # strength; 0 is vanilla
        floor: float = 0.1  # least standard deviation of a group's scores
        # Scores within this share of the group's largest one are equal: the multiplicative form jumps at z = 0, so the
        # last digits of equal scores would decide. Raise it where activations are bfloat16.
        resolution: float = 1e-5

        def __post_init__(self) -> None:
            require_choice("form", self.form, tuple(FORMS))
            require_number("alpha", self.alpha, 0)
            require_number("floor", self.floor, 0)
            require_number("resolution", self.resolution, 0, 1)
            if self.floor == 0:
                raise UserError("floor", self.floor, "give a positive number: a group may have equal scores")

    config: Config

    def verdicts(self, judged: Judged) -> Tensor:
        """Scores above their group's mean: whose reward is modified."""
        return self._z_scores(judged) > 0

    def rewards(self, rewards_B: Tensor, judged: Judged) -> Tensor:
        z_B = self._z_scores(judged)
        return FORMS[self.config.form](rewards_B.double(), z_B, self.config.alpha).to(rewards_B.dtype)

    def _z_scores(self, judged: Judged) -> Tensor:
        return group_z_scores(judged.scores_B, judged.uids, self.config.floor, self.config.resolution)
