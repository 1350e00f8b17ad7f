"""Scores of single tokens: what a detector of activations says of every token of a response.

Shapes: B rollouts, R response tokens of one, n those that count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.activation import KEY, ActivationConfig, ActivationDetector
from verl_grad_routing.detectors.base import BatchView, Detector, view_for
from verl_grad_routing.directions.checks import require_choice, require_int
from verl_grad_routing.errors import UserError

TOKEN_SCORES = ("projection", "cosine")


@dataclass(frozen=True, kw_only=True)
class TokenConfig(ActivationConfig):
    """How single tokens are scored; of no effect where nobody asks for that (gate ``per_token`` does)."""

    # projection: mean over layers of <h, v>, whose mean over a response is the rollout's score; cosine: the same over
    # |h| |v|, as the residual stream of some tokens is far longer than that of others.
    token_score: str = "projection"
    token_window: int = 1  # a token's score is the mean over so many counting tokens up to and with itself; 1: its own

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("token_score", self.token_score, TOKEN_SCORES)
        require_int("token_window", self.token_window, 1)

    @property
    def asks_for_tokens(self) -> bool:
        """Whether a setting is given that only scores of tokens follow."""
        return (self.token_score, self.token_window) != ("projection", 1)


class TokenDetector(ActivationDetector):
    """An ``ActivationDetector`` that scores every response token by the activation at the token's own position.

    The activation after a token has been read says what the model makes of it; the *gradient* of that token's
    log-prob begins one position earlier, where it is predicted. Routes are shifted by one for that reason, scores not.
    """

    scores_tokens: ClassVar[bool] = True
    config: TokenConfig

    def token_scores(self, view: BatchView) -> tuple[Tensor, ...]:
        """Of every rollout [n] float64: the token's projection, or its mean over a causal window."""
        rows, masks = view.activation_token_scores, view.response_masks
        if rows is None or masks is None:
            fix = "the batch has no activation scores of tokens; the worker must project every response token"
            raise UserError(KEY, self.name, fix)
        if any(row.shape != mask.shape for row, mask in zip(rows, masks, strict=True)):
            raise UserError(KEY, self.name, "token scores and response masks must be of the same lengths")
        return tuple(
            trailing_mean(row.to(torch.float64)[mask != 0], self.config.token_window)
            for row, mask in zip(rows, masks, strict=True)
        )


def trailing_mean(scores_n: Tensor, window: int) -> Tensor:
    """Mean over the last ``window`` scores up to and with each, over fewer at the start; 1 changes nothing."""
    if window == 1 or not len(scores_n):
        return scores_n
    padded = torch.nn.functional.pad(scores_n, (window - 1, 0))
    counts = torch.arange(1, len(scores_n) + 1, device=scores_n.device).clamp(max=window)
    return padded.unfold(0, window, 1).sum(1) / counts


def checked_token_scores(detector: Detector, view: BatchView) -> tuple[Tensor, ...]:
    """``detector.token_scores`` of ``view`` as it may see it, on the CPU.

    Raises:
        UserError: It does not score tokens, gives other than one number for each that counts, or none that is finite.
    """
    where = f"grad_routing.detector ({detector.name})"
    rows = tuple(row.detach().to("cpu", torch.float64) for row in detector.token_scores(view_for(detector, view)))
    assert view.response_masks is not None
    wanted = [int((mask != 0).sum()) for mask in view.response_masks]
    if [tuple(row.shape) for row in rows] != [(count,) for count in wanted]:
        fix = f"token_scores must return one number for each counting token of {len(wanted)} rollouts"
        raise UserError(where, [tuple(row.shape) for row in rows][:3], fix)
    for key, row in zip(view.keys, rows, strict=True):
        bad = ~torch.isfinite(row)
        if bad.any():
            fix = "scores must be finite; look for inf or NaN in the model's activations"
            raise UserError(f"{where} token score of rollout {key} at step {view.step}", float(row[bad][0]), fix)
    return rows
