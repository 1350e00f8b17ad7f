"""Old log-probs of rows that train under another forward gate than they were sampled under: their ratio starts at 1.

In the one update of an on-policy step they are the very log-probs that the update computes, so no pass of their own is
needed. A row of which one token alone is predicted under another gate is such a row as a whole: attention carries the
difference to all tokens after it.

Shapes: B rollouts of a micro-batch, T their tokens one after another, R those of the responses.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_grad_routing.routing import RoutingTable
from verl_grad_routing.training.masks import OFF, TOKEN_ROUTE, lengths_of, one_after_another, predicting_positions

CURRENT = "own_gate_current"
"""Non-tensor of a training batch: rows with a closed forward gate take the current log-probs as their old ones."""


def closed_rows(routes_B: Tensor, table: RoutingTable, of_tokens: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Rows whose forward gate differs from the open one that they were sampled under, at any position: bool [B].

    Args:
        of_tokens: Where routes are per token, those of all rows' response tokens and the rows' lengths [B].
    """
    gates_32, _ = table.as_tensors()
    closed_3 = (gates_32 != 1).any(dim=1).to(routes_B.device)
    closed_B = closed_3[routes_B]
    if of_tokens is not None:
        routes_R, lengths_B = of_tokens
        owner_R = torch.arange(len(closed_B), device=closed_B.device).repeat_interleave(lengths_B.to(closed_B.device))
        closed_B[owner_R[closed_3[routes_R]]] = True
    return closed_B


def with_current_log_probs(loss_function: Callable[..., Any], table: RoutingTable) -> Callable[..., Any]:
    """``loss_function`` with the detached current log-probs as ``old_log_probs`` of the closed rows."""

    def loss(*, model_output: dict[str, Any], data: TensorDict, **kwargs: Any) -> Any:
        tokens = data.get(TOKEN_ROUTE, None)
        of_tokens = None if tokens is None else (one_after_another(tokens), lengths_of(tokens))
        closed_B = closed_rows(data["route"], table, of_tokens)
        if OFF in data:
            closed_B &= data[OFF] == 0
        if closed_B.any():
            current, old = model_output["log_probs"], data["old_log_probs"]
            current_T = (current.values() if current.is_nested else current).detach()
            current_R, old_R = current_T[predicting_positions(data, "old_log_probs")], one_after_another(old)
            lengths_B = lengths_of(old).to(old_R.device)
            closed_R = closed_B.to(old_R.device).repeat_interleave(lengths_B)
            own_R = torch.where(closed_R, current_R.to(old_R), old_R)
            offsets = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
            data = data.copy()  # the columns are shared
            # without these, padding is to all tokens' number
            widths = {"min_seqlen": int(lengths_B.min()), "max_seqlen": int(lengths_B.max())}
            data["old_log_probs"] = torch.nested.nested_tensor_from_jagged(own_R, offsets, **widths)
        return loss_function(model_output=model_output, data=data, **kwargs)

    return loss
