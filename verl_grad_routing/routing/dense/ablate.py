"""Deployment: the quarantine's rows and columns set to zero in ordinary weights (SGTM, arXiv 2512.05648 §3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from verl_grad_routing.routing.dense.units import DenseBlocks


def ablated(name: str, tensor: Tensor, blocks: DenseBlocks) -> Tensor:
    """``tensor`` without the quarantine's part: itself where it has none, a copy otherwise.

    Rows of gate, up, q, k and v with their biases, columns of down and o: zero columns alone make the units absent,
    zero rows remove what they have learned from the file.
    """
    role = blocks.role(name)
    if role.dim is None:
        return tensor
    kept = tensor.detach().clone()
    for first, last in role.ranges:
        kept.narrow(role.dim, first, last - first).zero_()
    return kept


def all_ablated(tensors: Iterable[tuple[str, Tensor]], blocks: DenseBlocks) -> Iterator[tuple[str, Tensor]]:
    """Lazily, one tensor at a time."""
    for name, tensor in tensors:
        yield name, ablated(name, tensor, blocks)
