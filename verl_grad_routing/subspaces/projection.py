"""The weighted projection on a subspace, whole or on the rows that a rank holds.

Shapes: O output size (or a rank's share of it), I input size, K directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "singular": lambda values_K: values_K / values_K.sum(),
    "ones": torch.ones_like,
}
"""How much passes in each direction: the paper's share of the singular values, or all (an orthogonal projection)."""


def alphas(values_K: Tensor, weights: str) -> Tensor:
    """Weights [K] of the directions. TDGA, arXiv 2605.25189: ``alpha_i = sigma_i / sum_j sigma_j``.

    With more than one direction these are no projector's: applied twice they shrink twice, and the gain is at most
    ``alpha_1 < 1``.
    """
    return WEIGHTINGS[weights](values_K)


def coordinates(matrix_OI: Tensor, vectors_OK: Tensor) -> Tensor:
    """``Uᵀ G`` [K, I]; of some rows only, a summand of it."""
    return vectors_OK.T @ matrix_OI


def restore(coordinates_KI: Tensor, vectors_OK: Tensor, alphas_K: Tensor) -> Tensor:
    """``U diag(alpha) C`` [O, I], the rows that ``vectors_OK`` has."""
    return vectors_OK @ (alphas_K[:, None] * coordinates_KI)


def project(matrix_OI: Tensor, vectors_OK: Tensor, alphas_K: Tensor) -> Tensor:
    """``U diag(alpha) Uᵀ G`` [O, I]: only the output side is touched."""
    return restore(coordinates(matrix_OI, vectors_OK), vectors_OK, alphas_K)
