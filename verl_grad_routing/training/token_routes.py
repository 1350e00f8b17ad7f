"""The driver's part of routes of tokens: the gate's decision laid out beside the responses, and its shares.

Shapes: B real rollouts, R response tokens of one, n those of them that count, N rows of the batch with pad rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from verl_grad_routing.detectors import BatchView, Detector, checked_token_scores
from verl_grad_routing.gates import TokenDecision, TokenGate
from verl_grad_routing.routing import Route

Rows = tuple[Tensor, ...]


def decide_tokens(detector: Detector, gate: TokenGate, view: BatchView) -> TokenDecision:
    """The gate's decision, ``token_routes`` of all response tokens [R]: those that do not count have their row's."""
    scores = checked_token_scores(detector, view)
    order = view.tie_order()
    drawn = [scores[row] for row in order.tolist()]
    decision = gate.decide_tokens(drawn, view.step, detector.pair_means, detector.pair_scores)
    back = order.argsort()
    token_routes = tuple(decision.token_routes[row] for row in back.tolist())
    decision = TokenDecision(decision.routes_B[back], token_routes, decision.metrics)
    assert view.response_masks is not None
    rows = zip(decision.routes_B, decision.token_routes, view.response_masks, strict=True)
    laid_out = tuple(_laid_out(int(own), routes_n, mask_R) for own, routes_n, mask_R in rows)
    return TokenDecision(decision.routes_B, laid_out, decision.metrics | _spread(decision, scores))


def _laid_out(own: int, routes_n: Tensor, mask_R: Tensor) -> Tensor:
    routes_R = torch.full(mask_R.shape, own, dtype=torch.int64)
    routes_R[mask_R.cpu() != 0] = routes_n
    return routes_R


def _spread(decision: TokenDecision, scores: Rows) -> dict[str, float]:
    mixed = [bool((row != row[:1]).any()) for row in decision.token_routes]
    every = torch.cat(scores)
    return {
        "detector/token_score_mean": float(every.mean()),
        "detector/token_score_std": float(every.std(correction=0)),
        "routing/share_mixed": sum(mixed) / len(mixed),
    }


def trusted_tokens(token_routes: Rows, trusted_B: Tensor) -> Rows:
    """``token_routes`` with KEEP in all tokens of the trusted rollouts."""
    pairs = zip(token_routes, trusted_B.tolist(), strict=True)
    return tuple(torch.full_like(row, int(Route.KEEP)) if trusted else row for row, trusted in pairs)


def shares(routes_B: Tensor, token_routes: Rows | None, response_masks: Rows | None) -> dict[str, float]:
    """``routing/share_*``: of the rollouts, or of the counting tokens where they have routes of their own."""
    counted = routes_B
    if token_routes is not None and response_masks is not None:
        pairs = zip(token_routes, response_masks, strict=True)
        counted = torch.cat([row[mask.cpu() != 0] for row, mask in pairs])
    return {f"routing/share_{route.name.lower()}": float((counted == route).double().mean()) for route in Route}


def column(token_routes: Rows, rows: Sequence[int], lengths_N: Sequence[int]) -> list[Tensor]:
    """Of all N rows of a batch: the routes of the real ones, whose numbers are ``rows``, and ABSORB for the others."""
    everyone = [torch.full((length,), int(Route.ABSORB), dtype=torch.int64) for length in lengths_N]
    for row, routes_R in zip(rows, token_routes, strict=True):
        everyone[row] = routes_R
    return everyone
