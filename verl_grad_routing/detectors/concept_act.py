"""A concept direction in activation space, as advantage modification reads it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from verl_grad_routing.detectors.activation import KEY, RESIDUAL, ActivationDetector, PairsConfig, Reading
from verl_grad_routing.detectors.base import DETECTORS, Signal
from verl_grad_routing.directions.activation import Direction, concept_direction, project
from verl_grad_routing.directions.checks import require_choice, require_number
from verl_grad_routing.directions.pairs import MIN_PAIRS, PairSet, rows_with_tag
from verl_grad_routing.directions.pooling import POSITIONS
from verl_grad_routing.errors import UserError


@DETECTORS.register("concept_act")
class ConceptActivation(ActivationDetector):
    """``score = <h, d>``: h the mean over layers of the residual stream at one position, d not normalised.

    ``d = mean_p(h_unwanted - h_wanted)`` over contrastive pairs: When Reward Hacking Rebounds (arXiv 2604.01476,
    Eqs. 1-3), with h at 60-75% of the depth. The paper names the *prompt's* last token, where every rollout of a group
    has the same score and nothing would ever be modified; ``resp_last`` is what its method needs, ``prompt_last`` is
    there to show it. The direction's length matters: the floor of ``modify_reward`` is in units of this score.

    Pairs that carry ``held_out_tag`` do not enter the direction; it must order ``min_accuracy`` of them rightly before
    training starts (the paper: 20 of 20), or the run is refused, or warned about. Without such pairs the accuracy is
    that of directions fitted to the other pairs.
    """

    signal: ClassVar[Signal] = Signal.pairs

    @dataclass(frozen=True, kw_only=True)
    class Config(PairsConfig):
        position: str = "resp_last"  # resp_last, resp_mean or prompt_last
        held_out_tag: str | None = "held_out"  # pairs with this tag are kept out of the direction; null: none are
        min_accuracy: float = 1.0  # share of held-out pairs that the untrained model's direction must order rightly
        on_low_accuracy: str = "refuse"  # refuse or warn

        def __post_init__(self) -> None:
            super().__post_init__()
            require_choice("position", self.position, POSITIONS)
            require_number("min_accuracy", self.min_accuracy, 0, 1)
            require_choice("on_low_accuracy", self.on_low_accuracy, ("refuse", "warn"))
            if self.coordinates != RESIDUAL:
                fix = f"set {RESIDUAL}: one vector for all layers makes no sense across modules' own coordinates"
                raise UserError("coordinates", self.coordinates, fix)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.held_out: tuple[int, ...] = ()  # rows of the pairs

    @property
    def position(self) -> str:
        return self.config.position

    def expect(self, pairs: PairSet) -> None:
        tag = self.config.held_out_tag
        self.held_out = rows_with_tag(pairs, tag) if tag is not None else ()
        left = len(pairs) - len(self.held_out)
        if left < MIN_PAIRS:
            fix = f"{left} of {len(pairs)} pairs are left to fit; select others, or set null"
            raise UserError(f"{KEY}.held_out_tag", tag, fix)

    def _choose(self, read: Reading) -> Direction:
        unwanted_PLd, wanted_PLd = read.sides
        held = torch.zeros(len(unwanted_PLd), dtype=torch.bool)
        held[list(self.held_out)] = True
        direction = concept_direction(
            unwanted_PLd[~held],
            wanted_PLd[~held],
            layers=read.layers,
            pairs_hash=read.pairs_hash,
            seed=self.config.seed,
        )
        if self.held_out:
            unwanted_P1, wanted_P1 = (project(s[held], direction.vectors_Ld[None]) for s in (unwanted_PLd, wanted_PLd))
            direction = replace(direction, held_out_accuracy=float((unwanted_P1 > wanted_P1).double().mean()))
        if self.direction is None:  # later fits are of a model in training: a metric tells of them
            self._require_accuracy(direction.held_out_accuracy)
        return direction

    def _require_accuracy(self, accuracy: float) -> None:
        if accuracy >= self.config.min_accuracy:
            return
        what = "held-out pairs" if self.held_out else "pairs, each left out of the fit,"
        fix = (
            f"the direction orders {accuracy:.0%} of the {what} rightly; use other pairs or layers, "
            f"lower it, or set on_low_accuracy=warn"
        )
        error = UserError(f"{KEY}.min_accuracy", self.config.min_accuracy, fix)
        if self.config.on_low_accuracy == "refuse":
            raise error
        warnings.warn(str(error), UserWarning, stacklevel=2)
