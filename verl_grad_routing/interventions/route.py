"""Gradient routing proper, and its absence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_bool, require_choice, require_int
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions.base import INTERVENTIONS, Intervention, Judged
from verl_grad_routing.routing import DEFAULT, STRICT, Route, RouteMasks, RoutingTable

HEAD_START = {
    "nothing": RouteMasks(forward_gate=(1, 1), update_mask=(0, 0)),
    "quarantine": RouteMasks(forward_gate=(1, 1), update_mask=(0, 1)),
}
"""What unflagged rollouts train during the head start -> the masks of ABSORB then."""


@INTERVENTIONS.register("route")
class RouteGradients(Intervention):
    """Flagged rollouts train the quarantine block, trusted ones the deployed block, the others both.

    Gradient routing (Cloud et al., arXiv 2410.04332) with three routes per rollout:

    =======  ==========================  =======================================
    route    forward (deployed, quar.)   update (deployed, quarantine)
    =======  ==========================  =======================================
    KEEP     1, 0                        1, 0
    ABSORB   1, 1                        1, 1; with ``strict``: 1, 0
    ROUTE    1, 1                        0, 1
    =======  ==========================  =======================================

    KEEP rollouts are sampled with the quarantine on and trained with it off. Once the unwanted behaviour dominates a
    prompt group's baseline they receive negative advantages, which push the *wanted* behaviour down in the deployed
    block; ``clamp_keep_advantages`` sets those to zero. A rollout with advantage zero still counts in the KL and
    entropy terms and in the token denominator.

    **Head start.** Two equal blocks learn what nobody labels at the same speed, so plain absorption leaves it in the
    deployed block too. In steps 1 to ``head_start_steps`` ABSORB does not train the deployed block: its update is
    0, 0 (``head_start_unflagged: nothing``) or 0, 1 (``quarantine``); then the table above is in force. So at first the
    quarantine learns from flagged rollouts and the deployed block from trusted ones alone. The schedule also freezes
    rollouts, hence its control: the same steps with nothing flagged (preset ``head_start_freeze``).
    """

    uses_routes: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "strict": {"strict": True}}

    @dataclass(frozen=True)
    class Config:
        strict: bool = False  # unflagged rollouts train the deployed block alone
        clamp_keep_advantages: bool = True  # KEEP rollouts' advantages are max(advantage, 0)
        head_start_steps: int = 0  # steps 1..head_start_steps: unflagged rollouts do not train the deployed block
        head_start_unflagged: str = "nothing"  # what they train in these steps: nothing, or the quarantine

        def __post_init__(self) -> None:
            require_bool("strict", self.strict)
            require_bool("clamp_keep_advantages", self.clamp_keep_advantages)
            require_int("head_start_steps", self.head_start_steps, 0)
            require_choice("head_start_unflagged", self.head_start_unflagged, sorted(HEAD_START))
            if self.strict and self.head_start_steps and self.head_start_unflagged == "quarantine":
                fix = "set nothing, or strict: false: a strict quarantine learns from flagged rollouts alone"
                raise UserError("head_start_unflagged", self.head_start_unflagged, fix)

    config: Config

    @property
    def table(self) -> RoutingTable:
        return STRICT if self.config.strict else DEFAULT

    def table_at(self, step: int) -> RoutingTable:
        if step > self.config.head_start_steps:
            return self.table
        return replace(self.table, absorb=HEAD_START[self.config.head_start_unflagged])

    def advantages(self, advantages_BR: Tensor, judged: Judged) -> Tensor:
        keep_B = judged.routes_B.to(advantages_BR.device) == int(Route.KEEP)
        if not self.config.clamp_keep_advantages or not keep_B.any():
            return advantages_BR
        return torch.where(keep_B[:, None], advantages_BR.clamp(min=0), advantages_BR)


@INTERVENTIONS.register("none")
class NoIntervention(Intervention):
    """Nothing happens to a rollout whatever its score: both blocks train on everything. Scores are still logged."""

    needs_verdicts: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        pass
