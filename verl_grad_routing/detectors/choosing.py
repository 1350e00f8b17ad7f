"""Where a direction comes from, for detectors that differ in the space alone: activations or gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from verl_grad_routing.detectors.activation import ActivationConfig, ActivationDetector, Reading
from verl_grad_routing.detectors.base import Signal
from verl_grad_routing.directions.activation import Direction, difference_of_means, without_pairs
from verl_grad_routing.directions.checks import require_int
from verl_grad_routing.directions.controls import haar_directions
from verl_grad_routing.errors import UserError


class FromPairs(ActivationDetector):
    """The difference of means of contrastive pairs."""

    signal: ClassVar[Signal] = Signal.pairs

    def _choose(self, read: Reading) -> Direction:
        return difference_of_means(*read.sides, layers=read.layers, pairs_hash=read.pairs_hash, seed=self.config.seed)


@dataclass(frozen=True, kw_only=True)
class RandomConfig(ActivationConfig):
    """Which random direction."""

    direction_index: int = 0  # which of the seed's directions

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("direction_index", self.direction_index, 0)
        if self.refresh_every:
            raise UserError("refresh_every", self.refresh_every, "set 0: a random direction is never re-extracted")


class AtRandom(ActivationDetector):
    """A Haar-random unit vector in each layer or module, number ``direction_index`` of those that ``seed`` gives."""

    signal: ClassVar[Signal] = Signal.none
    needs_pairs: ClassVar[bool] = False
    config: RandomConfig

    def _choose(self, read: Reading) -> Direction:
        index = self.config.direction_index
        vectors_DLd = haar_directions(index + 1, read.layers, read.hidden_size, self.config.seed)
        return without_pairs(vectors_DLd[index], read.layers, "haar")
