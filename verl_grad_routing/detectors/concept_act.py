"""A concept direction in activation space, as advantage modification reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from verl_grad_routing.detectors.activation import RESIDUAL, ActivationDetector, PairsConfig
from verl_grad_routing.detectors.base import DETECTORS, Signal
from verl_grad_routing.directions.activation import Direction, concept_direction
from verl_grad_routing.directions.checks import require_choice
from verl_grad_routing.directions.pooling import POSITIONS
from verl_grad_routing.errors import UserError


@DETECTORS.register("concept_act")
class ConceptActivation(ActivationDetector):
    """``score = <h, d>``: h the mean over layers of the residual stream at one position, d not normalised.

    ``d = mean_p(h_unwanted - h_wanted)`` over contrastive pairs: When Reward Hacking Rebounds (arXiv 2604.01476,
    Eqs. 1-3), with h at 60-75% of the depth. The paper names the *prompt's* last token, where every rollout of a group
    has the same score and nothing would ever be modified; ``resp_last`` is what its method needs, ``prompt_last`` is
    there to show it. The direction's length matters: the floor of ``modify_reward`` is in units of this score.
    """

    signal: ClassVar[Signal] = Signal.pairs

    @dataclass(frozen=True, kw_only=True)
    class Config(PairsConfig):
        position: str = "resp_last"  # resp_last, resp_mean or prompt_last

        def __post_init__(self) -> None:
            super().__post_init__()
            require_choice("position", self.position, POSITIONS)
            if self.coordinates != RESIDUAL:
                fix = f"set {RESIDUAL}: one vector for all layers makes no sense across modules' own coordinates"
                raise UserError("coordinates", self.coordinates, fix)

    config: Config

    @property
    def position(self) -> str:
        return self.config.position

    def _choose(
        self,
        unwanted_PLd: Tensor | None,
        wanted_PLd: Tensor | None,
        layers: tuple[int | str, ...],
        hidden_size: int,
        pairs_hash: str | None,
    ) -> Direction:
        assert unwanted_PLd is not None and wanted_PLd is not None  # checked by fit
        return concept_direction(unwanted_PLd, wanted_PLd, layers=layers, pairs_hash=pairs_hash, seed=self.config.seed)
