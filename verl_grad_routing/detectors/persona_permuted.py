"""Control of ``persona_act``: the same pairs with their sides swapped at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from verl_grad_routing.detectors.activation import PairsConfig, Reading
from verl_grad_routing.detectors.base import DETECTORS, Signal
from verl_grad_routing.detectors.tokens import TokenConfig, TokenDetector
from verl_grad_routing.directions.activation import Direction
from verl_grad_routing.directions.controls import permuted_pairs


@DETECTORS.register("persona_permuted")
class PersonaPermuted(TokenDetector):
    """Projection on the difference of means after the sides of half of the pairs, drawn with ``seed``, are swapped."""

    signal: ClassVar[Signal] = Signal.pairs

    @dataclass(frozen=True, kw_only=True)
    class Config(TokenConfig, PairsConfig):
        pass

    config: Config

    def _choose(self, read: Reading) -> Direction:
        return permuted_pairs(*read.sides, seed=self.config.seed, layers=read.layers, pairs_hash=read.pairs_hash)
