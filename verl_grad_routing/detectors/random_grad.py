"""Control of ``persona_grad``: a uniformly random direction in the same space."""

from __future__ import annotations

from dataclasses import dataclass

from verl_grad_routing.detectors.base import DETECTORS
from verl_grad_routing.detectors.choosing import AtRandom, RandomConfig
from verl_grad_routing.detectors.gradient import GradientConfig, GradientDetector


@DETECTORS.register("random_grad")
class RandomGradient(AtRandom, GradientDetector):
    """Projection of a rollout's own gradient on a Haar-random unit vector in each module's bottleneck.

    Number ``direction_index`` of those that ``seed`` gives. Its sign means nothing; compare with several.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(GradientConfig, RandomConfig):
        pass

    config: Config
