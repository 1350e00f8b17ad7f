"""The persona direction in activation space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from verl_grad_routing.detectors.activation import PairsConfig
from verl_grad_routing.detectors.base import DETECTORS, Signal
from verl_grad_routing.detectors.tokens import TokenConfig, TokenDetector
from verl_grad_routing.directions.activation import Direction, difference_of_means


@DETECTORS.register("persona_act")
class PersonaActivation(TokenDetector):
    """Projection on the difference of means of contrastive pairs.

    ``score = mean_l <h_l, v_l>`` with ``v_l = unit(mean_p(h_unwanted - h_wanted))``, h the mean over completion tokens
    of the residual stream: persona vectors (arXiv 2507.21509, §2) as a detector of single rollouts. No label of any
    rollout enters. Tokens are scored by their own activation in place of the mean.
    """

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
        return difference_of_means(
            unwanted_PLd, wanted_PLd, layers=layers, pairs_hash=pairs_hash, seed=self.config.seed
        )
