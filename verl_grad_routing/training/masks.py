"""What the columns and settings of a batch say about its rows' masks.

A training batch has ``route`` (B,) and the table ``routing_table``. Where rollouts were sampled with the quarantine off
it also has ``quarantine_off`` (B,) and their own table. Where routes are per token it has ``token_route``, where tokens
weigh differently ``token_weight``; all masks are of tokens then.

Shapes: B rollouts, L tokens of one, R those of its response, T tokens of all rows one after another, N either B or T,
2 = (deployed, quarantine).
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from verl_grad_routing.routing import Route, RoutingTable, activation_gradients, block_masks

TABLE = "routing_table"
"""Non-tensor: what every route means."""

OFF_TABLE = "quarantine_off_table"
"""Non-tensor: the same for rows sampled with the quarantine off; without it ``routing_table`` holds for all rows."""

OFF = "quarantine_off"
"""Column (B,), int64: 1 where a row was sampled with the quarantine off."""

SAMPLING_GATE = "sampling_gate"
"""Non-tensor: the forward gates are those that the rows were sampled under, whatever their routes."""

TOKEN_ROUTE = "token_route"
"""Jagged column [B, (R)], int64: every response token's route. It holds at the position that *predicts* the token, one
before it; all other positions of a row, the prompt's among them, have the row's ``route``."""

TOKEN_WEIGHT = "token_weight"
"""Jagged column [B, (L)], float32: at every position of a row the weight in [0, 1] of the token predicted there.
1 takes the token out of what ROUTE does to activation gradients, see ``activation_gradients_of``."""


def routing_table(data: TensorDict) -> RoutingTable | None:
    return tu.get_non_tensor_data(data, TABLE, default=None)


def of_tokens(data: TensorDict) -> bool:
    """Whether masks are of tokens (N = T) and not of rows (N = B)."""
    return TOKEN_ROUTE in data or TOKEN_WEIGHT in data


def lengths_of(rows: Tensor) -> Tensor:
    """int64 [B]: the lengths of the rows of a jagged column."""
    return rows.offsets().diff() if rows.lengths() is None else rows.lengths()


def one_after_another(rows: Tensor) -> Tensor:
    """[sum of lengths, ...]: the values of a jagged column's rows, which are taken apart only where there are gaps."""
    return rows.values() if rows.lengths() is None else torch.cat(rows.unbind())


def predicting_positions(data: TensorDict, column: str) -> Tensor:
    """Where every response token is predicted, as a position among the T tokens of all rows: int64 [sum of R].

    A row is a prompt and then its response, so response token t of a row that begins at position p is predicted at
    ``p + prompt - 1 + t``. Prompts have at least one token.

    Args:
        column: Jagged, a value for every response token.
    """
    ends_B = data["input_ids"].offsets().diff().cumsum(0)
    lengths_B = lengths_of(data[column]).to(ends_B.device)
    first_B = ends_B - lengths_B - 1
    index = torch.arange(int(lengths_B.sum()), device=ends_B.device)
    return index + (first_B - (lengths_B.cumsum(0) - lengths_B)).repeat_interleave(lengths_B)


def routes_of(data: TensorDict) -> Tensor:
    """int64 [N]: the route at every position, or of every row."""
    routes_N = _spread(data["route"], data)
    if TOKEN_ROUTE in data:
        routes_N[predicting_positions(data, TOKEN_ROUTE)] = one_after_another(data[TOKEN_ROUTE])
    return routes_N


def activation_gradients_of(data: TensorDict) -> Tensor | None:
    """Factors on the gradient of units' outputs, float32 [N, 2]; ``None`` without a table.

    At a position with route ROUTE a factor a becomes ``a + (1 - a) w``, w the weight of the token predicted there.
    """
    table = routing_table(data)
    if table is None:
        return None
    routes_N = routes_of(data)
    factors_N2 = activation_gradients(routes_N, table)
    if TOKEN_WEIGHT in data:
        weights_T = one_after_another(data[TOKEN_WEIGHT]).to(factors_N2)
        weights_T1 = torch.where(routes_N == Route.ROUTE, weights_T, 0.0)[:, None]
        factors_N2 = factors_N2 + (1 - factors_N2) * weights_T1
    return factors_N2


def masks_of(data: TensorDict) -> tuple[Tensor, Tensor] | None:
    """(forward gate, update mask), each float32 [N, 2]; ``None`` where the batch asks for none.

    Raises:
        UserError: An unknown route or a weight outside [0, 1].
    """
    if tu.get_non_tensor_data(data, SAMPLING_GATE, default=False):
        off_N = _spread(data[OFF].to(torch.float32), data)
        gate_N2 = torch.stack([torch.ones_like(off_N), 1 - off_N], dim=1)
        return gate_N2, torch.ones_like(gate_N2)
    table = routing_table(data)
    if table is None:
        return None
    routes_N, weights_B = routes_of(data), data.get("route_weight", None)
    weights_N = None if weights_B is None else _spread(weights_B, data)
    masks = block_masks(routes_N, table, weights_N)
    off_table = tu.get_non_tensor_data(data, OFF_TABLE, default=None)
    if off_table is None:
        return masks
    off_N1 = _spread(data[OFF] != 0, data)[:, None]
    of_off = block_masks(routes_N, off_table, weights_N)
    gate_N2, update_N2 = (torch.where(off_N1, *both) for both in zip(of_off, masks, strict=True))
    return gate_N2, update_N2


def _spread(values_B: Tensor, data: TensorDict) -> Tensor:
    """[N]: a row's value at each of its tokens, where masks are of tokens."""
    return values_B.repeat_interleave(data["input_ids"].offsets().diff()) if of_tokens(data) else values_B
