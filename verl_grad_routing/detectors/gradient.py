"""Detectors that project every rollout's own gradient on a direction.

Legend: ``P`` pairs, ``M`` modules, ``r`` rank, ``D`` directions (1 here), ``B`` rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from verl_grad_routing.bottleneck import BASES, cosines
from verl_grad_routing.detectors.activation import KEY, ActivationConfig, ActivationDetector, Reading
from verl_grad_routing.directions.activation import Direction
from verl_grad_routing.directions.checks import require_choice
from verl_grad_routing.errors import UserError

SCORES = ("dot", "cosine")
PASSES = ("ablated", "reference")


@dataclass(frozen=True, kw_only=True)
class GradientConfig(ActivationConfig):
    """Where gradients are read; ``score_pass`` is the model whose gradients they are, never with the quarantine."""

    depth: tuple[float, float] = (0.0, 1.0)  # all layers, where layers is null
    score_pass: str = "ablated"  # ablated: the current policy, quarantine off; reference: the bare base model
    coordinates: str = "svd"  # svd: of the singular values of the base weights; lora: of a drawn adapter's bottleneck
    score: str = "dot"  # dot: mean over modules of <f_m, v_m>; cosine: of all modules together

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("score_pass", self.score_pass, PASSES)
        require_choice("coordinates", self.coordinates, tuple(BASES))
        require_choice("score", self.score, SCORES)


class GradientDetector(ActivationDetector):
    """Scores a rollout by the projection of the gradient of its mean negative log-likelihood on a direction.

    The gradient's coordinates are those of a frozen bottleneck of rank r on every module (``bottleneck``), no advantage
    enters. The direction is a unit vector in each module.
    """

    needs_gradients: ClassVar[bool] = True
    config: GradientConfig

    @property
    def cosine(self) -> bool:
        return self.config.score == "cosine"

    def resolve_score_pass(self, reference_in_actor: bool) -> str:
        del reference_in_actor  # no pass that verl runs has a backward pass per rollout
        return self.config.score_pass

    def projected(self, features_NLd: Tensor) -> Tensor:
        return cosines(features_NLd, self.directions_DLd) if self.cosine else super().projected(features_NLd)

    def _scored(self, direction: Direction, read: Reading) -> Direction:
        return _with_cosines(direction, *read.sides) if self.cosine and self.needs_pairs else direction

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "score": self.config.score}

    def load_state_dict(self, state: Any) -> None:
        if state.get("name") == self.name and state["score"] != self.config.score:
            fix = f"the run was started with {state['score']!r}; set the same or start a new run"
            raise UserError(f"{KEY}.score", self.config.score, fix)
        super().load_state_dict(state)


def _with_cosines(direction: Direction, unwanted_PMr: Tensor, wanted_PMr: Tensor) -> Direction:
    """``direction`` with the pairs scored as rollouts are, by cosine."""
    unwanted_P, wanted_P = (
        cosines(side, direction.vectors_Ld[None].to(side.device))[:, 0].cpu() for side in (unwanted_PMr, wanted_PMr)
    )
    return replace(
        direction,
        unwanted_scores_P=unwanted_P,
        wanted_scores_P=wanted_P,
        unwanted_mean=float(unwanted_P.mean()),
        wanted_mean=float(wanted_P.mean()),
    )
