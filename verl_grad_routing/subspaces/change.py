"""The basis of a weight change: the leading left singular vectors of after - before, matrix by matrix.

Shapes: O output size, I input size, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from verl_grad_routing.errors import UserError
from verl_grad_routing.subspaces.basis import Basis, Subspace

DENSE_LIMIT = 512  # up to this shorter side the whole decomposition is the quicker one


def leading(change_OI: Tensor, rank: int) -> Subspace:
    """The ``rank`` leading left singular vectors and values, in float32, of a change computed in float32 or better."""
    change_OI = change_OI.to(torch.float64)
    if min(change_OI.shape) <= max(DENSE_LIMIT, rank):
        vectors, values, _ = torch.linalg.svd(change_OI, full_matrices=False)
        return Subspace(vectors[:, :rank].float().contiguous(), values[:rank].float())
    start = np.random.default_rng(0).standard_normal(min(change_OI.shape))
    vectors, values, _ = svds(change_OI.numpy(), k=rank, v0=start)
    assert vectors is not None
    order = np.argsort(-values)
    return Subspace(torch.from_numpy(vectors[:, order].copy()).float(), torch.from_numpy(values[order].copy()).float())


def basis_of_change(
    before: Callable[[str], Tensor],
    after: Callable[[str], Tensor],
    modules: Iterable[str],
    rank: int,
    origin: Mapping[str, str],
) -> Basis:
    """Basis of ``after(name) - before(name)`` for every linear module; one matrix in memory at a time.

    Args:
        before: Module name to weight [O, I] of the model that the warm-up started from.
        after: The same after the warm-up.
        modules: Names of the linear modules.
        rank: Directions to keep of each.
        origin: See ``Basis``.

    Raises:
        UserError: More directions than a matrix has, or a matrix that the warm-up changed in fewer directions.
    """
    subspaces = {}
    for name in modules:
        old_OI, new_OI = before(name).to(torch.float64), after(name).to(torch.float64)
        if old_OI.shape != new_OI.shape:
            shapes = tuple(old_OI.shape), tuple(new_OI.shape)
            raise UserError(f"{name}.weight", shapes, "other shapes before and after: give two states of one model")
        if rank > min(old_OI.shape):
            raise UserError("--rank", rank, f"{name} is a matrix of {tuple(old_OI.shape)}; ask for no more directions")
        change_OI = new_OI - old_OI
        if not bool(change_OI.any()):
            raise UserError(f"{name}.weight", 0.0, "the warm-up did not change this matrix; train it, with more steps")
        subspaces[name] = leading(change_OI, rank)
    if not subspaces:
        raise UserError("modules", (), "the model has no linear modules to take a basis of")
    return Basis(subspaces, dict(origin))
