"""Bases of the two blocks: where the rows of A start, by name.

Both blocks start with ``B = 0``, so the adapted model is the base model. What differs is A: a comparison of blocks
measures routing only if neither starts larger than, or overlapping with, the other. So every row has the same norm, and
the rows of one block are orthogonal to those of the other (``kaiming_uniform``, PEFT's default, is the exception).
Bases that read contrastive pairs are in ``contrast_bases``.

Legend: ``d_in``, ``d_out`` sizes of the adapted layer; ``r_d``, ``r_q`` ranks of the blocks; ``P`` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from verl_grad_routing.errors import UserError

ROW_NORM = 1 / math.sqrt(3)
"""Norm of every row of A. PEFT's default, kaiming-uniform with a=√5, draws entries of variance 1/(3 d_in), so rows of
root-mean-square norm 1/√3 whatever d_in; we give every row exactly that norm."""


class BlockWeights(NamedTuple):
    """Float64 CPU weights of one module: ``A_d [r_d, d_in]``, ``A_q [r_q, d_in]``, ``B_d [d_out, r_d]``, ``B_q``."""

    A_d: Tensor
    A_q: Tensor
    B_d: Tensor
    B_q: Tensor


Initialisation = Callable[..., BlockWeights]
"""``(d_in, d_out, deployed_rank, quarantine_rank, generator, *asked) -> BlockWeights``; ``asked`` is the base layer's
weight ``[d_out, d_in]`` for one that needs it, then the contrast of its inputs ``[P, d_in]`` likewise; float64, CPU."""


@dataclass(frozen=True)
class Needs:
    """What an initialisation reads beside shapes and a generator: the base weight, the pairs' contrast; and to which
    block its first row goes, as rows are dealt in turn."""

    weight: bool = False
    contrast: bool = False
    leads: str = "deployed"


INITIALISATIONS: dict[str, Initialisation] = {}
_NEEDS: dict[str, Needs] = {}


def register_initialisation(
    name: str, *, needs_weight: bool = False, needs_contrast: bool = False, leads: str = "deployed"
) -> Callable[[Initialisation], Initialisation]:
    """Decorator; raises ``UserError`` when the name is taken."""

    def decorate(function: Initialisation) -> Initialisation:
        if INITIALISATIONS.setdefault(name, function) is not function:
            raise UserError("initialisation", name, "already registered; pick another name")
        _NEEDS[name] = Needs(needs_weight, needs_contrast, leads)
        return function

    return decorate


def needs_of(name: str) -> Needs:
    """What the initialisation ``name`` reads. Raises ``UserError`` for an unknown one."""
    get_initialisation(name)
    return _NEEDS[name]


def get_initialisation(name: str) -> Initialisation:
    """The function registered as ``name``; raises ``UserError`` for an unknown one."""
    if not isinstance(name, str):
        raise UserError("init", name, "a block has one basis; give one name")
    if name not in INITIALISATIONS:
        raise UserError("init", name, f"known: {', '.join(sorted(INITIALISATIONS))}")
    return INITIALISATIONS[name]


@register_initialisation("random_orthogonal")
def random_orthogonal(d_in: int, d_out: int, r_d: int, r_q: int, generator: torch.Generator) -> BlockWeights:
    """Rows of both A jointly orthogonal, each of norm :data:`ROW_NORM`; B zero.

    The rows are a Haar-random orthonormal frame: QR of a Gaussian with the signs of R's diagonal taken out
    (Mezzadri, arXiv math-ph/0609050).

    Raises:
        UserError: ``r_d + r_q > d_in``: there are not that many orthogonal rows.
    """
    if r_d + r_q > d_in:
        fix = f"use a total rank of at most {d_in}, the layer's input size, or exclude the layer"
        raise UserError("deployed_rank + quarantine_rank", r_d + r_q, fix)
    gaussian = torch.randn(d_in, r_d + r_q, generator=generator, dtype=torch.float64)
    frame, triangle = torch.linalg.qr(gaussian)
    rows = (frame * triangle.diagonal().sign()).t() * ROW_NORM
    return with_zero_B(rows[:r_d], rows[r_d:], d_out)


@register_initialisation("kaiming_uniform")
def kaiming_uniform(d_in: int, d_out: int, r_d: int, r_q: int, generator: torch.Generator) -> BlockWeights:
    """PEFT's default for each block: entries of A uniform in ±1/√d_in, B zero. Rows overlap by chance."""
    bound = 1 / math.sqrt(d_in)
    rows = (torch.rand(r_d + r_q, d_in, generator=generator, dtype=torch.float64) * 2 - 1) * bound
    return with_zero_B(rows[:r_d], rows[r_d:], d_out)


@register_initialisation("pissa_split", needs_weight=True)
def pissa_split(d_in: int, d_out: int, r_d: int, r_q: int, generator: torch.Generator, weight: Tensor) -> BlockWeights:
    """Right singular vectors of the base weight in turn: numbers 0, 2, 4, ... deployed, 1, 3, 5, ... quarantine.

    The basis is PiSSA's (arXiv 2404.02948), split between two blocks as in wassname/vGROUT_pub@c067218:
    src/vgrout/adapters/pissa.py. Unlike PiSSA, B is zero and the base weight stays whole, so nothing is lost when a
    block is deleted, and each row has norm :data:`ROW_NORM` instead of the root of its singular value: the blocks are
    orthogonal to each other and matched in scale, to each other and to ``random_orthogonal``. With unequal ranks the
    larger block still takes every second vector.

    Raises:
        UserError: The weight has fewer singular vectors than that (or, in all but rounding, a lower rank), or values
            that are not finite.
    """
    del generator
    count = max(2 * r_d - 1, 2 * r_q)
    if count > min(d_in, d_out):
        fix = (
            f"pissa_split takes {count} singular vectors and a layer has {min(d_in, d_out)}: lower ranks, or exclude it"
        )
        raise UserError("deployed_rank + quarantine_rank", r_d + r_q, fix)
    rows = right_singular_vectors(weight, count) * ROW_NORM
    return with_zero_B(rows[0 : 2 * r_d : 2], rows[1 : 2 * r_q : 2], d_out)


def right_singular_vectors(weight: Tensor, count: int) -> Tensor:
    """The first ``count`` right singular vectors of ``weight [d_out, d_in]`` as orthonormal rows ``[count, d_in]``.

    From the eigenvectors of the smaller of the two Gram matrices, two to four times as fast as a singular value
    decomposition; float64 leaves room for the squared condition number. One core takes about 1 s for a layer of
    1024 x 2560 and 20 s for one of 2560 x 9728, so a large model starts slowly where torch has one thread. The entry of
    largest magnitude of each row is positive (the first one of several).

    Raises:
        UserError: Values that are not finite, or a singular value below 1e-6 of the largest: its vector is not
            determined.
    """
    W = weight.double()
    if not torch.isfinite(W).all():
        raise UserError("base weight", "inf or NaN", "its singular vectors are needed; repair the checkpoint")
    tall = W.shape[0] >= W.shape[1]
    squares, vectors = torch.linalg.eigh(W.t() @ W if tall else W @ W.t())  # ascending
    rank = int((squares > 1e-12 * squares[-1]).sum())
    if rank < count:
        fix = f"{count} singular vectors are needed: lower the ranks, exclude the layer, or take another init"
        raise UserError("base weight's rank", rank, fix)
    top = vectors[:, -count:].flip(1)
    frame, _ = torch.linalg.qr(top if tall else W.t() @ top)  # orthonormal to the last digit; signs are set below
    rows = frame.t()
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign()


def with_zero_B(A_d: Tensor, A_q: Tensor, d_out: int) -> BlockWeights:
    """These rows, and zero columns."""
    return BlockWeights(A_d, A_q, *(torch.zeros(d_out, len(A), dtype=torch.float64) for A in (A_d, A_q)))


_DEGENERATE = 1e-6


def orthonormal(rows: Tensor) -> Tensor:
    """Gram-Schmidt of the rows in order, each keeping its sense. Raises ``UserError`` when one depends on others."""
    units = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    frame, triangle = torch.linalg.qr(units.t())
    left = triangle.diagonal()
    degenerate = ~(left.abs() >= _DEGENERATE)
    if degenerate.any():
        number = int(degenerate.nonzero()[0])
        fix = "it lies in the span of those before it: lower the ranks, or exclude the layer"
        raise UserError("basis direction", number, fix)
    return (frame * left.sign()).t()
