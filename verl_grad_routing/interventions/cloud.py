"""Cloud's gradient routing: weights on the gradient of activations, no mask on any parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions.base import INTERVENTIONS, Intervention
from verl_grad_routing.routing import RouteMasks, RoutingTable
from verl_grad_routing.token_weights import load_weights

LEARNS = RouteMasks(forward_gate=(1, 1), update_mask=(1, 1))


@INTERVENTIONS.register("cloud")
class RouteActivationGradients(Intervention):
    """Gradient routing of Cloud et al. (arXiv 2410.04332, eq. 1) on the outputs of dedicated units.

    On flagged rollouts the gradient that comes back to a unit's output is multiplied by ``alpha`` for deployed units
    and by 1 for the quarantine's; the forward pass is as it is. So what leads to deployed units (their gate and up
    rows, and layers before them by that path) learns ``alpha`` times as much, a negative alpha unlearns, while down
    and o projections, biases and layers without quarantine learn in full. All other rollouts train everything,
    the quarantine too: absorption needs that (their expanded dimensions' learning rate 1.0 off target).

    **Weights of tokens.** With ``token_weights`` the factor at a position of a flagged rollout is
    ``alpha (1 - w) + w``, w the weight of the token that is *predicted* there, prompts included: Expand-Route-Ablate's
    per-token alpha, whose weights come from frequency ratios (``token_weights``, ``vgr token-weights``). All else is as
    above, so a table of zeros changes nothing.
    """

    uses_routes: ClassVar[bool] = True
    takes_token_routes: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        alpha: float = 0.0  # factor on the gradient at deployed units' outputs of flagged rollouts
        token_weights: str | None = None  # file of vgr token-weights; null: all tokens weigh alike

        def __post_init__(self) -> None:
            number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
            if not number or not math.isfinite(self.alpha) or self.alpha > 1:
                raise UserError("alpha", self.alpha, "give a number of at most 1; 0 stops the gradient")
            if self.token_weights is not None and not (isinstance(self.token_weights, str) and self.token_weights):
                raise UserError("token_weights", self.token_weights, "give a file of vgr token-weights, or null")

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        file = config.token_weights
        self._weights_V = None if file is None else load_weights("grad_routing.intervention.token_weights", file)

    @property
    def token_weights_V(self) -> Tensor | None:
        return self._weights_V

    @property
    def table(self) -> RoutingTable:
        flagged = RouteMasks((1, 1), (1, 1), activation_gradient=(self.config.alpha, 1.0))
        return RoutingTable(keep=LEARNS, absorb=LEARNS, route=flagged)
