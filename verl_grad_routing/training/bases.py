"""A worker's frozen bases, made when they are first asked for and kept."""

from __future__ import annotations

from torch import nn

from verl_grad_routing.bottleneck import Bottleneck, ModuleBasis, bases_of


class Bases:
    """Bases of the bottlenecks that were asked for; every rank must ask for the same, in the same order.

    Args:
        layers: All decoder layers, in order.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self._made: dict[Bottleneck, dict[str, ModuleBasis]] = {}

    def of(self, bottleneck: Bottleneck) -> dict[str, ModuleBasis]:
        """By module name, in the model's order. Raises ``UserError`` as ``bases_of`` does."""
        if bottleneck not in self._made:
            self._made[bottleneck] = bases_of(self.layers, bottleneck)
        return self._made[bottleneck]
