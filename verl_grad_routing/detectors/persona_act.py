"""The persona direction in activation space."""

from __future__ import annotations

from dataclasses import dataclass

from verl_grad_routing.detectors.activation import PairsConfig
from verl_grad_routing.detectors.base import DETECTORS
from verl_grad_routing.detectors.choosing import FromPairs
from verl_grad_routing.detectors.tokens import TokenConfig, TokenDetector


@DETECTORS.register("persona_act")
class PersonaActivation(FromPairs, TokenDetector):
    """Projection on the difference of means of contrastive pairs.

    ``score = mean_l <h_l, v_l>`` with ``v_l = unit(mean_p(h_unwanted - h_wanted))``, h the mean over completion tokens
    of the residual stream: persona vectors (arXiv 2507.21509, §2) as a detector of single rollouts. No label of any
    rollout enters. Tokens are scored by their own activation in place of the mean.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TokenConfig, PairsConfig):
        pass

    config: Config
