"""What the columns and settings of a batch say about its rows' masks.

A training batch has ``route`` (B,) and the table ``routing_table``. Where rollouts were sampled with the quarantine off
it also has ``quarantine_off`` (B,) and their own table. Shapes: B rollouts, 2 = (deployed, quarantine).
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from verl_grad_routing.routing import RoutingTable, block_masks

TABLE = "routing_table"
"""Non-tensor: what every route means."""

OFF_TABLE = "quarantine_off_table"
"""Non-tensor: the same for rows sampled with the quarantine off; without it ``routing_table`` holds for all rows."""

OFF = "quarantine_off"
"""Column (B,), int64: 1 where a row was sampled with the quarantine off."""

SAMPLING_GATE = "sampling_gate"
"""Non-tensor: the forward gates are those that the rows were sampled under, whatever their routes."""


def routing_table(data: TensorDict) -> RoutingTable | None:
    return tu.get_non_tensor_data(data, TABLE, default=None)


def row_masks(data: TensorDict) -> tuple[Tensor, Tensor] | None:
    """(forward gate, update mask) of every row, each float32 [B, 2]; ``None`` where the batch asks for none.

    Raises:
        UserError: An unknown route or a weight outside [0, 1].
    """
    if tu.get_non_tensor_data(data, SAMPLING_GATE, default=False):
        off_B = data[OFF].to(torch.float32)
        gate_B2 = torch.stack([torch.ones_like(off_B), 1 - off_B], dim=1)
        return gate_B2, torch.ones_like(gate_B2)
    table = routing_table(data)
    if table is None:
        return None
    weights_B = data.get("route_weight", None)
    masks = block_masks(data["route"], table, weights_B)
    off_table = tu.get_non_tensor_data(data, OFF_TABLE, default=None)
    if off_table is None:
        return masks
    off_B1 = (data[OFF] != 0)[:, None]
    of_off = block_masks(data["route"], off_table, weights_B)
    gate_B2, update_B2 = (torch.where(off_B1, *both) for both in zip(of_off, masks, strict=True))
    return gate_B2, update_B2
