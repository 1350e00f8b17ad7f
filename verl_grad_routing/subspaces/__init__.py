"""Subspaces of weight changes: the few output directions in which a clean warm-up moved each matrix.

Pure torch. TDGA (arXiv 2605.25189) restricts training to them; the overlap of two
checkpoints' subspaces measures drift.
"""

from verl_grad_routing.subspaces.basis import Basis, Subspace, load_basis, save_basis
from verl_grad_routing.subspaces.change import basis_of_change
from verl_grad_routing.subspaces.drift import canonical_overlap, drift
from verl_grad_routing.subspaces.projection import WEIGHTINGS, alphas, project

__all__ = [
    "WEIGHTINGS",
    "Basis",
    "Subspace",
    "alphas",
    "basis_of_change",
    "canonical_overlap",
    "drift",
    "load_basis",
    "project",
    "save_basis",
]
