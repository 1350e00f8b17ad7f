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

ON = (1, 1)


@INTERVENTIONS.register("cloud")
class RouteActivationGradients(Intervention):
    """Gradient routing of Cloud et al. (arXiv 2410.04332, eq. 1) on the outputs of dedicated units.

    On flagged rollouts the gradient that comes back to a unit's output is multiplied by ``alpha`` for deployed units
    and by 1 for the quarantine's; the forward pass is as it is. So what leads to deployed units (their gate and up
    rows, and layers before them by that path) learns ``alpha`` times as much, a negative alpha unlearns, while down
    and o projections, biases and layers without quarantine learn in full. On all other rollouts the factors are 1 and
    ``off_target``: 1 trains the quarantine too, as absorption needs.

    In the paper's code these are ``original_dim_lr_target`` and ``expanded_dim_lr_off_target``; the other two of its
    four factors, ``expanded_dim_lr_target`` and ``original_dim_lr_off_target``, are 1 in all its experiments.

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
        off_target: float = 1.0  # factor on the gradient at the quarantine's units' outputs of all other rollouts
        token_weights: str | None = None  # file of vgr token-weights; null: all tokens weigh alike

        def __post_init__(self) -> None:
            for key, value in (("alpha", self.alpha), ("off_target", self.off_target)):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not math.isfinite(value) or value > 1:
                    raise UserError(key, value, "give a number of at most 1; 0 stops the gradient")
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
        others = RouteMasks(ON, ON, activation_gradient=(1.0, self.config.off_target))
        flagged = RouteMasks(ON, ON, activation_gradient=(self.config.alpha, 1.0))
        return RoutingTable(keep=others, absorb=others, route=flagged)
