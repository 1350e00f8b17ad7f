"""Control of ``persona_act``: the same pairs with their sides swapped at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from verl_grad_routing.detectors.activation import PairsConfig
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

    def _choose(
        self,
        unwanted_PLd: Tensor | None,
        wanted_PLd: Tensor | None,
        layers: tuple[int | str, ...],
        hidden_size: int,
        pairs_hash: str | None,
    ) -> Direction:
        assert unwanted_PLd is not None and wanted_PLd is not None  # checked by fit
        return permuted_pairs(unwanted_PLd, wanted_PLd, seed=self.config.seed, layers=layers, pairs_hash=pairs_hash)
