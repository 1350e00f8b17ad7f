"""Gradient routing proper, and its absence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_bool, require_choice, require_int, require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions.base import INTERVENTIONS, Intervention, Judged
from verl_grad_routing.interventions.groups import group_of
from verl_grad_routing.interventions.head_start import MEASURES, HeadStart
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
    deployed block too. In steps 1 to ``head_start_steps``, or until ``head_start_measure`` of a step's rollouts (or of
    a validation of the quarantine alone) is at least ``head_start_until``, ABSORB does not train the deployed block:
    its update is 0, 0 (``head_start_unflagged: nothing``) or 0, 1 (``quarantine``); then the table above is in force.
    So at first the quarantine learns from flagged rollouts and the deployed block from trusted ones alone. The schedule
    also freezes rollouts, hence its control: the same steps with nothing flagged (preset ``head_start_freeze``).

    **Routes of tokens** (gate ``per_token``) mean the same at the position that predicts the token; a KEEP token's
    advantage alone is clamped.

    **Rollouts sampled with the quarantine off** (``grad_routing.quarantine_off_share``) come from the deployed policy.
    With ``quarantine_off_gate: sampled`` they are trained as they were sampled, forward gate 1, 0: KEEP and ABSORB
    train the deployed block, on-policy and with advantages of either sign. A flagged one is the deployed block's own
    doing and may not train it, so it leaves the step and its group's statistics, and a group with one rollout left
    leaves with it. With ``routed`` the table above holds for them too; their old log-probs stay those of the policy
    that sampled them, so under an open gate the PPO ratio is the importance weight between the two policies.
    """

    uses_routes: ClassVar[bool] = True
    takes_token_routes: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "strict": {"strict": True}}

    @dataclass(frozen=True)
    class Config:
        strict: bool = False  # unflagged rollouts train the deployed block alone
        clamp_keep_advantages: bool = True  # KEEP rollouts' advantages are max(advantage, 0)
        head_start_steps: int = 0  # steps 1..head_start_steps: unflagged rollouts do not train the deployed block
        head_start_until: float | None = None  # a rate that ends the head start sooner; null for none
        head_start_measure: str = "flagged"  # the rate's: flagged, reward, or swapped_reward of the quarantine alone
        head_start_unflagged: str = "nothing"  # what they train in these steps: nothing, or the quarantine
        quarantine_off_gate: str = "sampled"  # forward gate of rollouts sampled with the quarantine off: or routed

        def __post_init__(self) -> None:
            require_bool("strict", self.strict)
            require_bool("clamp_keep_advantages", self.clamp_keep_advantages)
            require_int("head_start_steps", self.head_start_steps, 0)
            require_choice("head_start_unflagged", self.head_start_unflagged, sorted(HEAD_START))
            require_choice("head_start_measure", self.head_start_measure, MEASURES)
            self._check_until()
            require_choice("quarantine_off_gate", self.quarantine_off_gate, ["routed", "sampled"])
            if self.strict and self.head_start_steps and self.head_start_unflagged == "quarantine":
                fix = "set nothing, or strict: false: a strict quarantine learns from flagged rollouts alone"
                raise UserError("head_start_unflagged", self.head_start_unflagged, fix)

        def _check_until(self) -> None:
            if self.head_start_until is None:
                return
            require_number("head_start_until", self.head_start_until)
            if self.head_start_measure == "flagged" and not 0 < self.head_start_until <= 1:
                raise UserError("head_start_until", self.head_start_until, "give a share in (0, 1]")
            if not self.head_start_steps:
                fix = "give the most steps that it may take"
                raise UserError("head_start_steps", self.head_start_steps, fix)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.head_start = HeadStart(config.head_start_steps, config.head_start_until, config.head_start_measure)

    @property
    def table(self) -> RoutingTable:
        return STRICT if self.config.strict else DEFAULT

    def table_at(self, step: int) -> RoutingTable:
        if not self.head_start.in_force(step):
            return self.table
        return replace(self.table, absorb=HEAD_START[self.config.head_start_unflagged])

    def quarantine_off_table_at(self, step: int) -> RoutingTable:
        return (
            self.table_at(step)
            if self.config.quarantine_off_gate == "routed"
            else super().quarantine_off_table_at(step)
        )

    def observe(self, step: int, measures: Mapping[str, float]) -> None:
        self.head_start.observe(step, measures)

    def report(self, step: int) -> dict[str, float]:
        return {"intervention/head_start": float(self.head_start.in_force(step))} if self.head_start.steps else {}

    def state_dict(self) -> dict[str, Any]:
        return self.head_start.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.head_start.load_state_dict(state)

    def rejected(self, judged: Judged) -> Tensor | None:
        if judged.quarantine_off_B is None or self.config.quarantine_off_gate == "routed":
            return None
        own_B = judged.quarantine_off_B & judged.flagged_B
        group_B, groups = group_of(judged.uids)
        kept_G = torch.bincount(group_B[~own_B], minlength=groups)
        thinned_G = torch.bincount(group_B[own_B], minlength=groups) > 0
        return own_B | (thinned_G & (kept_G < 2))[group_B]

    def advantages(self, advantages_BR: Tensor, judged: Judged) -> Tensor:
        routes_BR = judged.routes_B[:, None]
        if judged.token_routes is not None:
            routes_BR = torch.nn.utils.rnn.pad_sequence(list(judged.token_routes), batch_first=True)
            width = advantages_BR.shape[1]
            routes_BR = torch.nn.functional.pad(routes_BR, (0, width - routes_BR.shape[1]), value=int(Route.ABSORB))
        keep_BR = routes_BR.to(advantages_BR.device) == int(Route.KEEP)
        if judged.quarantine_off_B is not None:  # these are on-policy
            keep_BR = keep_BR & ~judged.quarantine_off_B.to(keep_BR.device)[:, None]
        if not self.config.clamp_keep_advantages or not keep_BR.any():
            return advantages_BR
        return torch.where(keep_BR, advantages_BR.clamp(min=0), advantages_BR)


@INTERVENTIONS.register("none")
class NoIntervention(Intervention):
    """Nothing happens to a rollout whatever its score: both blocks train on everything. Scores are still logged."""

    needs_verdicts: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        pass
