"""A gate that gives every token a route of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_choice
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates.base import GATES, Gate, GateDecision, PairMeans, PairScores, PairStatistics
from verl_grad_routing.routing import Route

ELSEWHERE = ("most_tokens", "any_token")


@dataclass(frozen=True)
class TokenDecision:
    """Routes of tokens and what follows for their rollouts, int64 values of ``Route``.

    Attributes:
        routes_B: The rollout's own route: that of all positions that predict no scored token, and the verdict on it.
        token_routes: Of every rollout the routes [n] of its scored tokens, in their order.
        metrics: Of the inner gate, whose scores are the tokens', and ``gate/drift``, likewise.
    """

    routes_B: Tensor
    token_routes: tuple[Tensor, ...]
    metrics: dict[str, float]


class TokenGate(Gate):
    """A gate whose scores are those of tokens; ``decide`` takes them for rollouts of one token."""

    per_token = True

    def decide_tokens(
        self,
        scores: Sequence[Tensor],
        step: int,
        pair_means: PairMeans | None = None,
        pair_scores: PairScores | None = None,
    ) -> TokenDecision:
        """Decide the routes of all scored tokens of one batch; arguments and errors as in ``decide``.

        Args:
            scores: Of every rollout the finite scores of its tokens, float64 [n]; n may be 0, but not of all.
        """
        decision = self.decide(torch.cat(tuple(scores)), step, pair_means, pair_scores)
        rows = decision.routes_B.split([len(row) for row in scores])
        routes_B = torch.tensor([self._elsewhere(row) for row in rows], dtype=torch.int64)
        return TokenDecision(routes_B, rows, decision.metrics)

    @abstractmethod
    def _elsewhere(self, routes_n: Tensor) -> int:
        """The rollout's own route, from those of its scored tokens."""


@GATES.register("per_token")
class PerToken(TokenGate):
    """Routes every token by an inner gate, to which all tokens of the batch are what rollouts are otherwise.

    Shares, caps, windows and half-lives of the inner gate therefore count tokens, whichever rollout they are of: with
    ``route: 0.1`` of a batch quantile a tenth of the batch's tokens is routed; a rollout may hold none or only such.
    A history of the whole run holds every token of it, 8 bytes each: give the inner gate a window.

    **Positions that predict no scored token** (the prompt but for its last token, what tools wrote, the end) have the
    rollout's own route. They are there for the response's tokens all the same: attention carries every later token's
    loss to them. ``elsewhere: most_tokens`` gives them the route that more than half of the rollout's scored tokens
    have, ABSORB where there is none such; ``any_token`` gives them ROUTE as soon as one token is routed (nothing of a
    routed token's loss then trains the deployed block through the prompt) and follows the former rule otherwise.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        # The gate that decides on the tokens: ``name`` and its settings.
        inner: Mapping[str, Any] = field(default_factory=lambda: {"name": "history_quantile", "keep": 0.0})
        elsewhere: str = "most_tokens"  # the route of positions that predict no scored token: or any_token

        def __post_init__(self) -> None:
            require_choice("elsewhere", self.elsewhere, ELSEWHERE)
            if not isinstance(self.inner, Mapping):
                raise UserError("inner", self.inner, "give a gate: {name: ..., ...}")
            if GATES.build(self.inner, "inner").per_token:  # and refuse its bad settings here
                raise UserError("inner.name", self.inner["name"], "this gate decides on tokens already; give another")
            if GATES.build(self.inner, "inner").rescores:
                raise UserError("inner.rescore", True, "tokens are not scored again; set false")

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.inner = GATES.build(config.inner, "grad_routing.gate.inner")
        self.needs_pair_means = self.inner.needs_pair_means

    def _elsewhere(self, routes_n: Tensor) -> int:
        if self.config.elsewhere == "any_token" and (routes_n == int(Route.ROUTE)).any():
            return int(Route.ROUTE)
        counts = torch.bincount(routes_n, minlength=len(Route))
        most = int(counts.argmax())
        return most if 2 * int(counts[most]) > len(routes_n) else int(Route.ABSORB)

    def _routes(self, scores: np.ndarray, step: int, pairs: PairStatistics) -> GateDecision:
        return self.inner.decide(torch.from_numpy(scores), step, pairs.means, pairs.scores)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.inner.load_state_dict(state["inner"])
