"""Confident clean data: rows of the dataset that somebody vouches for, whatever the detector says of their rollouts.

SGTM's confident retain set (arXiv 2512.05648) for RL: a prompt without a loophole cannot be hacked, so its rollouts may
be kept. No detector sees the column.

Shapes: B rollouts of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import Route

KEY = "grad_routing.trusted_column"
EXTRA = "extra_info"


def column_of(name: str) -> str:
    """The dataset's column that ``name`` lies in."""
    return EXTRA if name.startswith(f"{EXTRA}.") else name


def trusted_rows(name: str, column: Sequence[Any], keys: Sequence[str]) -> Tensor:
    """Which rollouts are of trusted rows, bool [B].

    Args:
        name: ``grad_routing.trusted_column``.
        column: The column's value for every rollout.
        keys: Rollout ids, for the message.

    Raises:
        UserError: A row has no such key, or neither true nor false (0 and 1 will do).
    """
    inner = name.removeprefix(f"{EXTRA}.") if column_of(name) != name else None
    found = []
    for key, value in zip(keys, column, strict=True):
        if inner is not None:
            if not isinstance(value, Mapping) or inner not in value:
                raise UserError(KEY, name, f"the row of rollout {key} has no {EXTRA}.{inner}; write it in every row")
            value = value[inner]
        value = value.item() if hasattr(value, "item") else value
        if value not in (0, 1):
            raise UserError(f"{KEY} ({name}) of rollout {key}", value, "give true or false in every row")
        found.append(bool(value))
    return torch.tensor(found)


def trust(routes_B: Tensor, trusted_B: Tensor) -> tuple[Tensor, dict[str, float]]:
    """``routes_B`` with KEEP for the trusted rollouts, and metrics of it.

    ``routing/trusted_overruled`` is the share of the trusted rollouts that would have been routed.
    """
    kept_B = torch.where(trusted_B, torch.full_like(routes_B, int(Route.KEEP)), routes_B)
    overruled_B = trusted_B & (routes_B == Route.ROUTE)
    metrics = {"routing/share_trusted": float(trusted_B.double().mean())}
    if trusted_B.any():
        metrics["routing/trusted_overruled"] = float(overruled_B.sum() / trusted_B.sum())
    return kept_B, metrics
