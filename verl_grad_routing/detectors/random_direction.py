"""Control: a uniformly random direction in place of the persona direction."""

from __future__ import annotations

from dataclasses import dataclass

from verl_grad_routing.detectors.base import DETECTORS
from verl_grad_routing.detectors.choosing import AtRandom, RandomConfig
from verl_grad_routing.detectors.tokens import TokenConfig, TokenDetector


@DETECTORS.register("random")
class RandomDirection(AtRandom, TokenDetector):
    """Projection on a Haar-random unit vector per layer: number ``direction_index`` of those that ``seed`` gives.

    Its sign means nothing, and one such direction can separate rollouts well by luck: compare with several.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TokenConfig, RandomConfig):
        pass

    config: Config
