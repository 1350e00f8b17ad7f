"""A worker's frozen bases, made when they are first asked for and kept."""

from __future__ import annotations

from torch import nn

from verl_grad_routing.bottleneck import Bottleneck, ModuleBasis, bases_of


class Bases:
    """Bases of the bottlenecks that were asked for last; every rank must ask for the same.

    Args:
        layers: All decoder layers, in order.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self._made: tuple[Bottleneck, dict[str, ModuleBasis]] | None = None

    def of(self, bottleneck: Bottleneck) -> dict[str, ModuleBasis]:
        """By module name, in the model's order. Raises ``UserError`` as ``bases_of`` does."""
        if self._made is None or self._made[0] != bottleneck:
            self._made = None  # the old ones go before the new ones come
            self._made = bottleneck, bases_of(self.layers, bottleneck)
        return self._made[1]
