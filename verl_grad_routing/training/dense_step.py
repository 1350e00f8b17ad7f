"""One optimizer step over blocks that are parts of the same weights: rows or columns clipped and stepped alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from verl_grad_routing.routing.dense import BlockParts
from verl_grad_routing.training.block_optim import DecayToStart
from verl_grad_routing.training.block_step import BlockStep


class DenseStep(BlockStep):
    """The step over views of full parameters, see :class:`BlockParts` for why views.

    Parameters of neither block are a third group, ``shared``: clipped by their own norm (or with the blocks where those
    are clipped jointly), stepped whenever a token teaches anything. Changes of parameters are not measured: that needs
    a second copy of the model.

    Args:
        optimizer: One parameter group for each of ``parts.blocks``, in that order.
        parts: The views.
        clip_norms: Gradient norm limit of each.
        jointly: Clip all of the model by one norm, as verl does, under the largest of the limits.
        decay: Decay towards the start.
        freeze_inactive: As in ``BlockStep``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: BlockParts,
        clip_norms: Mapping[str, float],
        *,
        jointly: bool = False,
        decay: DecayToStart | None = None,
        freeze_inactive: bool = True,
    ):
        options: dict[str, Any] = {"jointly": jointly, "decay": decay, "freeze_inactive": freeze_inactive}
        super().__init__(optimizer, parts.blocks, clip_norms, [], **options)
        self.parts = parts

    @torch.no_grad()
    def __call__(
        self, mass_2: Sequence[float], gradients_anew: Callable[[], None], factors_2: Sequence[float] = (1.0, 1.0)
    ) -> float:
        self.parts.bind()
        try:
            return super().__call__(mass_2, gradients_anew, factors_2)
        finally:
            self.parts.release()

    def _masses(self, mass_2: Sequence[float]) -> dict[str, float]:
        masses = super()._masses(mass_2)
        return masses | {"shared": max(masses.values())}  # above 0 as soon as a token teaches either block

    def _clip(self, name: str) -> float:
        norm = self._norm(name)
        self._limit(name, norm, self.clip_norms[name])
        return norm

    def _clip_jointly(self) -> dict[str, float]:
        norms = {name: self._norm(name) for name in self.blocks}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        for name in self.blocks:
            self._limit(name, total, max(self.clip_norms.values()))
        return norms

    def _limit(self, name: str, norm: float, limit: float) -> None:
        if math.isfinite(limit):  # else it would be a pass over all gradients that multiplies by 1
            torch.nn.utils.clip_grads_with_norm_(self.blocks[name], limit, torch.tensor(norm))

    def _norm(self, name: str) -> float:
        return self.parts.norm([part.grad for part in self.blocks[name] if part.grad is not None])

    def _step(self) -> dict[str, float]:
        self._decay()
        self.optimizer.step()
        return {}
