"""Selective gradient masking: SGTM and the variants that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from verl_grad_routing.directions.checks import require_choice
from verl_grad_routing.interventions.base import INTERVENTIONS
from verl_grad_routing.interventions.route import RouteGradients
from verl_grad_routing.routing import ACTIVATION_MASKING, DEFAULT, STRICT, RouteMasks, RoutingTable

SGTM_TABLES = {
    "parameter_masking": DEFAULT,
    "activation_masking": ACTIVATION_MASKING,
    "gradient_routing": replace(DEFAULT, route=RouteMasks((1, 1), (1, 1), activation_gradient=(0, 1))),
}
"""Variant -> what forget (ROUTE), unlabeled (ABSORB) and confident retain (KEEP) rollouts do to the two blocks."""


@INTERVENTIONS.register("sgtm")
class SelectiveGradientMasking(RouteGradients):
    """The three labels of SGTM (arXiv 2512.05648 §3) as routes, per rollout instead of per batch.

    ====================  ==========================  =====================================================
    variant               forget: forward             forget: what learns
    ====================  ==========================  =====================================================
    parameter_masking     both blocks                 the quarantine's parameters
    activation_masking    deployed units absent       the quarantine, and what is in ``blocks.units.shared``
    gradient_routing      both blocks                 everything but the way back through deployed units
    ====================  ==========================  =====================================================

    Unlabeled rollouts train both blocks, confident retain ones the deployed block with the quarantine's units zeroed
    in the forward pass. ``gradient_routing`` stops the gradient at deployed units' outputs, so their projections,
    biases and the residual stream around them still learn from forget rollouts: it needs blocks of dedicated units.
    Projections that learn from both (``..._no_proj``) are a matter of ``blocks.units.shared``. Everything else that
    ``route`` can do (a strict quarantine, a head start) it can do with these tables too.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}}

    @dataclass(frozen=True)
    class Config(RouteGradients.Config):
        variant: str = "parameter_masking"  # or activation_masking, gradient_routing

        def __post_init__(self) -> None:
            super().__post_init__()
            require_choice("variant", self.variant, sorted(SGTM_TABLES))

    config: Config

    @property
    def table(self) -> RoutingTable:
        table = SGTM_TABLES[self.config.variant]
        return replace(table, absorb=STRICT.absorb) if self.config.strict else table
