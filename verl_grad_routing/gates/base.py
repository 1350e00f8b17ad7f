"""What a gate is: scores of a whole batch in, one route per rollout out.

Shapes: B rollouts of the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import Registry

PairMeans = tuple[float, float]  # mean score of the (unwanted, wanted) sides of the pairs
PairScores = tuple[Tensor, Tensor]  # scores [P] of the (unwanted, wanted) sides, row p of both from pair p


class PairStatistics(NamedTuple):
    """What a gate may know of the contrastive pairs; ``None`` where the detector has no such thing."""

    means: PairMeans | None = None
    scores: PairScores | None = None


@dataclass(frozen=True)
class GateDecision:
    """Routes [B], int64 values of ``Route``, and the metrics of the decision."""

    routes_B: Tensor
    metrics: dict[str, float]


class Gate(ABC):
    """Turns scores into routes. A subclass has a frozen dataclass ``Config`` and is registered in ``GATES``.

    Attributes:
        needs_pair_means: ``decide`` needs what the detector's contrastive pairs score, hence a detector with pairs.
        per_token: It decides on tokens (then it is a ``TokenGate``), hence a detector that scores tokens.

    Every gate keeps count, mean and variance of all scores seen (for ``gate/drift``), in whatever units the detector
    scores. The state is exact: a restored gate decides as the saved one would have.
    """

    name: ClassVar[str] = ""  # set by the registry
    needs_pair_means: bool = False
    per_token: bool = False
    Config: ClassVar[type]

    def __init__(self, config: Any):
        self.config = config
        self._seen, self._mean, self._sum_squares = 0, 0.0, 0.0  # of all scores so far; squares about the mean

    @property
    def rescores(self) -> bool:
        """The history is to be scored again whenever the direction has changed: before ``decide``, by ``rescore``."""
        return bool(getattr(self.config, "rescore", False))

    @property
    def remembered(self) -> int:
        """Scores of earlier batches that thresholds are made from."""
        return 0

    def rescore(self, scores_N: Tensor) -> None:
        """Put ``scores_N`` in place of the remembered ones, of the same rollouts in the order of ``decide``.

        ``gate/drift`` goes on comparing with the scores as they were made.

        Raises:
            UserError: Another number of scores.
        """
        if len(scores_N) != self.remembered:
            raise UserError("scores", len(scores_N), f"give one for each of the {self.remembered} remembered")
        self._put(scores_N.detach().cpu().double().numpy().copy())

    def _put(self, scores: np.ndarray) -> None:
        """Take new scores for the remembered ones; a gate with a history overrides this and ``remembered``."""
        assert not len(scores), "nothing is remembered here"

    def decide(
        self, scores_B: Tensor, step: int, pair_means: PairMeans | None = None, pair_scores: PairScores | None = None
    ) -> GateDecision:
        """Decide the routes of one batch and take its scores into the history.

        Args:
            scores_B: Finite scores, float64 [B], B >= 1.
            step: Global step, 1 for the first.
            pair_means: Mean scores of the unwanted and of the wanted sides of the pairs, where there are pairs.
            pair_scores: Scores [P] of every pair's unwanted and of every pair's wanted side, likewise.

        Raises:
            UserError: No scores, scores of another shape or type, a score that is not finite, or missing pair means
                or pair scores.
        """
        if scores_B.ndim != 1 or scores_B.numel() == 0 or scores_B.dtype != torch.float64:
            raise UserError(
                "scores", f"{scores_B.dtype} {tuple(scores_B.shape)}", "give float64 scores [B] with B >= 1"
            )
        if not torch.isfinite(scores_B).all():
            raise UserError("scores", scores_B[~torch.isfinite(scores_B)][0].item(), "give finite scores")
        scores = scores_B.detach().cpu().numpy().copy()
        drift = self._drift(scores)
        decision = self._routes(scores, step, PairStatistics(pair_means, pair_scores))
        self._remember(scores)
        return GateDecision(decision.routes_B, {**decision.metrics, "gate/drift": drift})

    @abstractmethod
    def _routes(self, scores: np.ndarray, step: int, pairs: PairStatistics) -> GateDecision:
        """The decision, but for ``gate/drift``."""

    def _drift(self, scores: np.ndarray) -> float:
        """How far the batch's mean is from the mean of all earlier scores, in their standard deviations."""
        deviation = math.sqrt(self._sum_squares / self._seen) if self._seen else 0.0
        return (float(scores.mean()) - self._mean) / deviation if deviation > 0 else math.nan

    def _remember(self, scores: np.ndarray) -> None:
        """Chan, Golub & LeVeque's update of count, mean and squares."""
        mean, total = float(scores.mean()), self._seen + len(scores)
        gap = mean - self._mean
        self._sum_squares += float(((scores - mean) ** 2).sum()) + gap * gap * self._seen * len(scores) / total
        self._mean += gap * len(scores) / total
        self._seen = total

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, exact."""
        moments = {"seen": self._seen, "mean": self._mean, "sum_squares": self._sum_squares}
        return {"name": self.name, "rescore": self.rescores, **moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``. Raises ``UserError`` when it is another gate's, or of one that rescores unlike it."""
        if state.get("name") != self.name:
            fix = f"the checkpoint was written with {state.get('name')!r}; set the same or start a new run"
            raise UserError("grad_routing.gate.name", self.name, fix)
        if state.get("rescore", False) != self.rescores:
            fix = f"the checkpoint's run has {not self.rescores}, and features or none; set the same or start a new run"
            raise UserError("grad_routing.gate.rescore", self.rescores, fix)
        self._seen, self._mean, self._sum_squares = state["seen"], state["mean"], state["sum_squares"]


GATES: Registry[Gate] = Registry("gate")
