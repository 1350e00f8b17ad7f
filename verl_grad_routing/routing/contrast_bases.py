"""Bases from contrastive pairs: ``corda``, signed ``scorda`` and its reversed control ``scorda_rev``.

The pairs enter through the differences ``D`` of a layer's pooled inputs, unwanted side minus wanted side. As in the
other bases B is zero and the base weight stays whole: nothing is lost when a block is deleted, and a plain adapter
holds what was learned; only A's rows carry the basis, and their signs are a convention. The lineage
(wassname/vGROUT_pub@c067218) has a frozen ``B₀`` of singular vectors too and subtracts ``B₀ A₀``: that is the form
``two_sided`` (``forms``).

Its rows are normalised one by one and may overlap; ours are made orthonormal in order (QR: the first k rows of a
sequence span what its first k directions span), then dealt to the two blocks in turn and scaled to ``ROW_NORM``.

Legend: ``d_in``, ``d_out`` sizes of the adapted layer; ``r_d``, ``r_q`` ranks of the blocks; ``P`` pairs; ``I`` =
``d_in``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.bases import (
    ROW_NORM,
    BlockWeights,
    orthonormal,
    register_initialisation,
    right_singular_vectors,
    with_zero_B,
)

RIDGE = 1e-3
"""Ridge of the contrast covariance in units of its mean eigenvalue (the lineage's)."""


@register_initialisation("corda", needs_weight=True, needs_contrast=True)
def corda(
    d_in: int, d_out: int, r_d: int, r_q: int, generator: torch.Generator, weight: Tensor, difference_PI: Tensor
) -> BlockWeights:
    """Directions of W as the pairs' contrast sees it, in turn: 0, 2, 4, ... deployed, 1, 3, 5, ... quarantine.

    With ``C = DᵀD/P + ε tr(DᵀD/P)/d_in · I`` (ε = :data:`RIDGE`) and the singular value decomposition
    ``W C^½ = U S Q``, the rows are those of ``Q C^½``: input directions in which the pairs differ and which W maps
    strongly. CorDA (arXiv 2406.05223, §3) decomposes ``W C`` with the covariance of its data and takes the inverse out
    again, so that W stays the product of its parts; here nothing is taken out of W, and the lineage reads ``C^½``.

    The contrast has rank P at most: rows beyond P are W's singular vectors seen through the ridge, so with few pairs
    and large ranks this is close to ``pissa_split``.

    Raises:
        UserError: The pairs do not differ in this layer's inputs, or the weight has too few singular vectors.
    """
    del generator
    count = max(2 * r_d - 1, 2 * r_q)
    _check_count("corda", count, d_in, d_out, r_d + r_q)
    root_II = _covariance_root(difference_PI)
    vectors = right_singular_vectors(weight.double() @ root_II, count) @ root_II
    rows = orthonormal(vectors) * ROW_NORM
    return with_zero_B(rows[0 : 2 * r_d : 2], rows[1 : 2 * r_q : 2], d_out)


@register_initialisation("scorda", needs_weight=True, needs_contrast=True, leads="quarantine")
def scorda(
    d_in: int, d_out: int, r_d: int, r_q: int, generator: torch.Generator, weight: Tensor, difference_PI: Tensor
) -> BlockWeights:
    """The quarantine's first row is ``u = unit(mean_P D)``, with its sign; the rest are W's singular vectors without u.

    Signed CorDA: the covariance has no polarity, the mean difference has: a positive activation of the seed reads "as
    the unwanted side". Singular vectors number 0, 2, 4, ... go to the deployed block and 1, 3, 5, ... follow u in the
    quarantine. The lineage gives the deployed block numbers 0 to r - 1 and the quarantine the ones after, so there the
    blocks differ in more than the seed.

    Raises:
        UserError: The pairs' mean difference is zero in this layer, or the weight has too few singular vectors.
    """
    del generator
    seeded, other = _seeded(d_in, d_out, r_q, r_d, weight, difference_PI)
    return with_zero_B(other, seeded, d_out)


@register_initialisation("scorda_rev", needs_weight=True, needs_contrast=True)
def scorda_rev(
    d_in: int, d_out: int, r_d: int, r_q: int, generator: torch.Generator, weight: Tensor, difference_PI: Tensor
) -> BlockWeights:
    """Control: ``scorda`` with the blocks exchanged, so that the *deployed* block starts with the pairs' direction.

    If the seed decides where the unwanted behaviour is learned, deleting the quarantine must not remove it here.

    Raises:
        UserError: As ``scorda``.
    """
    del generator
    seeded, other = _seeded(d_in, d_out, r_d, r_q, weight, difference_PI)
    return with_zero_B(seeded, other, d_out)


def _seeded(
    d_in: int, d_out: int, r_seeded: int, r_other: int, weight: Tensor, difference_PI: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of the block with the seed and of the other one."""
    count = max(2 * r_other - 1, 2 * (r_seeded - 1))
    _check_count("scorda", count + 1, d_in, d_out + 1, r_seeded + r_other)
    mean_I = difference_PI.double().mean(0)
    scale = float(difference_PI.double().abs().max())
    if not mean_I.norm() > 1e-12 * scale:
        raise UserError(
            "pairs", "mean difference 0", "the sides differ in no direction here; other pairs or exclude it"
        )
    vectors = right_singular_vectors(weight, count)
    rows = orthonormal(torch.cat([(mean_I / mean_I.norm())[None], vectors])) * ROW_NORM
    seed, rest = rows[:1], rows[1:]
    return torch.cat([seed, rest[1 : 2 * (r_seeded - 1) : 2]]), rest[0 : 2 * r_other : 2]


def _covariance_root(difference_PI: Tensor) -> Tensor:
    """``C^½`` of the ridged contrast covariance, ``[I, I]``, scaled so that the ridge's part is the identity.

    The scale of C does not matter to the directions. ``C = a (I + V diag(λ/a) Vᵀ)`` with the right singular vectors V
    of D, so ``C^½ ∝ I + V diag(√(1 + λ/a) - 1) Vᵀ``.
    """
    D = difference_PI.double()
    pairs, d_in = D.shape
    ridge = RIDGE * D.square().sum() / pairs / d_in
    if not ridge > 0:
        raise UserError("pairs", "difference 0", "the sides give this layer equal inputs; other pairs or exclude it")
    _, singular, V = torch.linalg.svd(D, full_matrices=False)
    gain = (1 + singular.square() / pairs / ridge).sqrt() - 1
    return torch.eye(d_in, dtype=torch.float64) + (V.t() * gain) @ V


def _check_count(name: str, count: int, d_in: int, d_out: int, total: int) -> None:
    if count > min(d_in, d_out):
        fix = f"{name} takes {count} directions and a layer has {min(d_in, d_out)}: lower ranks, or exclude it"
        raise UserError("deployed_rank + quarantine_rank", total, fix)
