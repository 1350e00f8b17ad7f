"""Means of hidden states over the completion tokens of each rollout, in packed or padded batches.

A rollout's mean is a fixed function of its own hidden states, bit for bit: its tokens are added in a tree of
neighbours (1+2, 3+4, ..., then the sums again), whose shape depends on its own number of tokens alone. Reductions that
a library lays out by the size of the whole batch (a matrix product, ``sum``, atomic adds) would not promise that.

Legend: ``T`` tokens of a packed batch, ``B`` rollouts, ``S`` padded length, ``d`` hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

POSITIONS = ("resp_mean", "resp_last", "prompt_last")


def position_mask(response_mask_R: Tensor, prompt_length: int, position: str) -> Tensor:
    """Which tokens of a row [prompt, then R response tokens] are pooled, bool.

    ``resp_mean``: every completion token; ``resp_last``: the last of them; ``prompt_last``: the prompt's last token.
    A row without completion tokens (padding) pools none.
    """
    mask = torch.nn.functional.pad(response_mask_R != 0, (prompt_length, 0))
    if position == "resp_mean" or not mask.any():
        return mask
    chosen = torch.zeros_like(mask)
    chosen[int(mask.nonzero().max()) if position == "resp_last" else prompt_length - 1] = True
    return chosen


class _Level(NamedTuple):
    """One level of the trees of all rollouts: rows ``left`` of the level below, plus rows ``right`` where there are."""

    left: Tensor
    right_to: Tensor
    right: Tensor


class PoolPlan:
    """Where the tokens of a batch go. Made once per batch, used for every layer.

    Args:
        token_mask_T: Non-zero where a token belongs to a completion (bool or number, ``[T]``).
        segment_T: Rollout of each token, ``0..rollouts - 1``; anything where the mask is zero.
        rollouts: B.

    Attributes:
        has_tokens_B: Whether a rollout has completion tokens (bool, on the device of ``token_mask_T``).

    Raises:
        ValueError: Shapes differ, or a completion token belongs to no rollout.
    """

    def __init__(self, token_mask_T: Tensor, segment_T: Tensor, rollouts: int):
        if token_mask_T.ndim != 1 or token_mask_T.shape != segment_T.shape:
            raise ValueError(f"mask {tuple(token_mask_T.shape)} and segments {tuple(segment_T.shape)} must both be [T]")
        device = token_mask_T.device
        tokens = np.flatnonzero((token_mask_T != 0).cpu().numpy())
        segments = segment_T.cpu().numpy()[tokens]
        if len(segments) and not (segments.min() >= 0 and segments.max() < rollouts):
            raise ValueError(f"a completion token belongs to rollout {segments.min()}..{segments.max()} of {rollouts}")
        counts = np.bincount(segments, minlength=rollouts)
        rows = tokens[np.argsort(segments, kind="stable")]
        self.tokens = len(token_mask_T)
        self.has_tokens_B = torch.from_numpy(counts > 0).to(device)
        self._counts_B = torch.from_numpy(counts).to(device)
        self._levels: list[_Level] = []
        while True:
            level, counts = _halve(rows, counts)
            self._levels.append(_Level(*(torch.from_numpy(index).to(device) for index in level)))
            rows = np.arange(counts.sum())
            if counts.max(initial=0) <= 1:
                break

    def mean(self, hidden_Td: Tensor) -> Tensor:
        """Mean over each rollout's completion tokens ``[B, d]``; zeros for a rollout without any.

        Sums in float32, in float64 where ``hidden_Td`` is float64. Hidden states of other tokens are never read.
        """
        if hidden_Td.ndim != 2 or len(hidden_Td) != self.tokens:
            raise ValueError(f"hidden states {tuple(hidden_Td.shape)} must be [{self.tokens}, d]")
        dtype = torch.float64 if hidden_Td.dtype == torch.float64 else torch.float32
        rows = hidden_Td.detach()
        for level in self._levels:
            total = rows.index_select(0, level.left).to(dtype)
            rows = total.index_add_(0, level.right_to, rows.index_select(0, level.right).to(dtype))
        pooled_Bd = torch.zeros(len(self._counts_B), hidden_Td.shape[1], dtype=dtype, device=hidden_Td.device)
        pooled_Bd[self.has_tokens_B] = rows / self._counts_B[self.has_tokens_B, None]
        return pooled_Bd


def pool_tokens(hidden_Td: Tensor, token_mask_T: Tensor, segment_T: Tensor, rollouts: int) -> tuple[Tensor, Tensor]:
    """Means over the completion tokens of each rollout of a packed batch; arguments as for ``PoolPlan``.

    Returns:
        ``(pooled_Bd, has_tokens_B)``: float32 (float64 for float64 hidden states), zeros where there are no tokens.
    """
    plan = PoolPlan(token_mask_T, segment_T, rollouts)
    return plan.mean(hidden_Td), plan.has_tokens_B


def pool_padded(hidden_BSd: Tensor, token_mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """As ``pool_tokens`` for a padded batch, one rollout per row; bit for bit the packed result."""
    rollouts, length = token_mask_BS.shape
    segment_T = torch.arange(rollouts, device=token_mask_BS.device).repeat_interleave(length)
    return pool_tokens(hidden_BSd.reshape(rollouts * length, -1), token_mask_BS.reshape(-1), segment_T, rollouts)


def _halve(rows: np.ndarray, counts: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Pair neighbours within each rollout, of which ``rows`` lists the rows, one rollout after the other."""
    halves = (counts + 1) // 2
    rollout = np.repeat(np.arange(len(counts)), halves)
    rank = 2 * (np.arange(len(rollout)) - np.repeat(np.cumsum(halves) - halves, halves))
    left = (np.cumsum(counts) - counts)[rollout] + rank
    paired = np.flatnonzero(rank + 1 < counts[rollout])
    return (rows[left], paired, rows[left[paired] + 1]), halves
