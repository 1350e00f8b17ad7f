"""How far two checkpoints' changes point in the same directions.

Shapes: O output size, K directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_grad_routing.errors import UserError
from verl_grad_routing.subspaces.basis import Basis


def canonical_overlap(first_OK: Tensor, second_OK: Tensor) -> float:
    """Mean singular value of ``U_tᵀ U_s``, in [0, 1]; 1 where both span the same subspace.

    TDGA's CCA_k (arXiv 2605.25189): canonical correlations of two orthonormal bases are the cosines of the principal
    angles between their spans, so the choice of basis within a span does not matter.
    """
    return float(torch.linalg.svdvals(first_OK.double().T @ second_OK.double()).mean())


def drift(first: Basis, second: Basis) -> dict[str, float]:
    """``canonical_overlap`` of every matrix. Raises ``UserError`` where the two are of other models or ranks."""
    if set(first.subspaces) != set(second.subspaces):
        only = sorted(set(first.subspaces) ^ set(second.subspaces))
        raise UserError("basis", only[0], "only one of the two has this matrix: give two bases of one model")
    overlaps = {}
    for name, one in first.subspaces.items():
        other = second.subspaces[name]
        if one.vectors_OK.shape != other.vectors_OK.shape:
            shapes = tuple(one.vectors_OK.shape), tuple(other.vectors_OK.shape)
            raise UserError(name, shapes, "the two bases have other sizes: give two bases of one model and rank")
        overlaps[name] = canonical_overlap(one.vectors_OK, other.vectors_OK)
    return overlaps
