"""What trains each block in a mini-batch: counted in tokens and in rollouts, over all ranks.

Shapes: B rollouts of this rank, R response tokens of all of them, 2 = (deployed, quarantine).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed import ReduceOp
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.masks import (
    lengths_of,
    masks_of,
    of_tokens,
    one_after_another,
    predicting_positions,
    routing_table,
)


@dataclass(frozen=True)
class Mass:
    """Of a mini-batch. ``all_tokens`` and ``all_rollouts`` are what verl's losses divide by.

    Tokens are counted; rollouts are the mini-batch's nominal number, pad rows and rows without a token among them.
    """

    tokens_2: torch.Tensor
    rollouts_2: torch.Tensor
    all_tokens: float
    all_rollouts: float

    def factors(self, mean_over: str) -> tuple[float, float]:
        """What turns a sum over a block's own part of the batch, divided by all of it, into a mean over that part."""
        if mean_over == "batch":
            return 1.0, 1.0
        own, whole = (
            (self.tokens_2, self.all_tokens) if mean_over == "own_tokens" else (self.rollouts_2, self.all_rollouts)
        )
        deployed, quarantine = (whole / count if count > 0 else 1.0 for count in own.tolist())
        return deployed, quarantine


def block_mass(data: TensorDict, group: Any) -> Mass:
    """Of the mini-batch ``data``, all-reduced over ``group``. Raises ``UserError`` for a batch without routes."""
    if "route" not in data or routing_table(data) is None:
        raise UserError("route", None, "every row of a training batch needs a route; the trainer writes it")
    masks = masks_of(data)
    assert masks is not None
    _, update_N2 = masks
    # verl's own rejection takes a rollout out of response_mask, which the losses read, and leaves loss_mask, their
    # denominator
    rows, counted = data["response_mask"], data["loss_mask"]
    tokens_B1, all_B1 = (
        _by_row(one_after_another(mask), lengths_of(mask)).to(update_N2)[:, None] for mask in (rows, counted)
    )
    if of_tokens(data):
        update_R2 = update_N2[predicting_positions(data, "response_mask")]  # of all rows' response tokens
        own_B2 = _by_row(one_after_another(rows).to(update_N2)[:, None] * update_R2, lengths_of(rows))
        parts_B2 = own_B2 / tokens_B1.clamp(min=1)  # a rollout trains a block by the share of its tokens
    else:
        own_B2, parts_B2 = tokens_B1 * update_N2, (tokens_B1 > 0) * update_N2
    parts = [own_B2.sum(0), parts_B2.sum(0), all_B1.sum(0), (all_B1 > 0).sum(0)]
    totals = torch.cat(parts).to(get_device_id(), torch.float64)
    torch.distributed.all_reduce(totals, op=ReduceOp.SUM, group=group)
    nominal = tu.get_non_tensor_data(data, "global_batch_size", None)
    return Mass(totals[:2], totals[2:4], float(totals[4]), float(totals[5] if nominal is None else nominal))


def _by_row(values_R: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """float64 [B, ...]: the sum over each row of values [R, ...] of all rows' tokens, in their order."""
    owner_R = torch.arange(len(lengths_B), device=values_R.device).repeat_interleave(lengths_B.to(values_R.device))
    sums = values_R.new_zeros((len(lengths_B), *values_R.shape[1:]), dtype=torch.float64)
    return sums.index_add_(0, owner_R, values_R.to(torch.float64))
