"""Control: a uniformly random direction in place of the persona direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from verl_grad_routing.detectors.base import DETECTORS, Signal
from verl_grad_routing.detectors.tokens import TokenConfig, TokenDetector
from verl_grad_routing.directions.activation import Direction, without_pairs
from verl_grad_routing.directions.checks import require_int
from verl_grad_routing.directions.controls import haar_directions
from verl_grad_routing.errors import UserError


@DETECTORS.register("random")
class RandomDirection(TokenDetector):
    """Projection on a Haar-random unit vector per layer: number ``direction_index`` of those that ``seed`` gives.

    Its sign means nothing, and one such direction can separate rollouts well by luck: compare with several.
    """

    signal: ClassVar[Signal] = Signal.none
    needs_pairs: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True)
    class Config(TokenConfig):
        direction_index: int = 0  # which of the seed's directions

        def __post_init__(self) -> None:
            super().__post_init__()
            require_int("direction_index", self.direction_index, 0)
            if self.refresh_every:
                raise UserError("refresh_every", self.refresh_every, "set 0: a random direction is never re-extracted")

    config: Config

    def _choose(
        self,
        unwanted_PLd: Tensor | None,
        wanted_PLd: Tensor | None,
        layers: tuple[int | str, ...],
        hidden_size: int,
        pairs_hash: str | None,
    ) -> Direction:
        del unwanted_PLd, wanted_PLd, pairs_hash
        index = self.config.direction_index
        return without_pairs(haar_directions(index + 1, layers, hidden_size, self.config.seed)[index], layers, "haar")
