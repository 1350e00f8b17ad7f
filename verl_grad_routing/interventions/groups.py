"""Statistics within prompt groups. Shapes: B rollouts, G groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_of(uids: Sequence[str]) -> tuple[Tensor, int]:
    """Group number of each rollout (int64 [B], in order of first appearance) and how many groups there are."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in uids], dtype=torch.int64), len(numbers)


def group_sizes(uids: Sequence[str]) -> Tensor:
    """How many rollouts of the batch share each rollout's prompt, itself included: int64 [B]."""
    group_B, groups = group_of(uids)
    return torch.bincount(group_B, minlength=groups)[group_B]


def group_z_scores(values_B: Tensor, uids: Sequence[str], floor: float, resolution: float = 0.0) -> Tensor:
    """``(value - group mean) / max(unbiased group standard deviation, floor)``, float64 [B].

    A rollout that is alone in its group has nothing to be compared with: 0. So has one that differs from its group's
    mean by no more than ``resolution`` times the largest absolute value in the group: values that ought to be equal
    and were computed in different micro-batches differ in their last digits.
    """
    values = values_B.to(torch.float64)
    group_B, groups = group_of(uids)
    sizes_G = torch.bincount(group_B, minlength=groups).to(torch.float64)
    mean_G = torch.zeros(groups, dtype=torch.float64).index_add_(0, group_B, values) / sizes_G
    gap_B = values - mean_G[group_B]
    squares_G = torch.zeros(groups, dtype=torch.float64).index_add_(0, group_B, gap_B**2)
    deviation_G = (squares_G / (sizes_G - 1).clamp(min=1)).sqrt().clamp(min=floor)
    largest_G = torch.zeros(groups, dtype=torch.float64).scatter_reduce_(0, group_B, values.abs(), "amax")
    different_B = (sizes_G[group_B] > 1) & (gap_B.abs() > resolution * largest_G[group_B])
    return torch.where(different_B, gap_B / deviation_G[group_B], torch.zeros_like(gap_B))
