"""The persona direction in gradient space."""

from __future__ import annotations

from dataclasses import dataclass

from verl_grad_routing.detectors.activation import PairsConfig
from verl_grad_routing.detectors.base import DETECTORS
from verl_grad_routing.detectors.choosing import FromPairs
from verl_grad_routing.detectors.gradient import GradientConfig, GradientDetector


@DETECTORS.register("persona_grad")
class PersonaGradient(FromPairs, GradientDetector):
    """Projection of a rollout's own gradient on the difference of the mean gradients of contrastive pairs.

    ``score = mean_m <f_m, v_m>`` with ``v_m = unit(mean_p(f_unwanted - f_wanted))`` and f the gradient of the
    completion's mean negative log-likelihood with respect to a gate on a frozen bottleneck of module m, without an
    advantage: wassname/vGROUT_pub@c067218, src/vgrout/extract_vhack_grad.py:164-207 (its router ``routeV``). That
    code's bottleneck is the live adapter; ours is frozen, so that scores of different steps are comparable and exist
    while the adapter is still zero. No label of any rollout enters.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(GradientConfig, PairsConfig):
        pass

    config: Config
