"""How the two blocks start: functions by name, deterministic per module name and seed.

Both blocks start with ``B = 0``, so the adapted model is the base model. What differs is A: a comparison of blocks
measures routing only if neither starts larger than, or overlapping with, the other.

Legend: ``d_in``, ``d_out`` sizes of the adapted layer; ``r_d``, ``r_q`` ranks of the blocks; ``R = r_d + r_q``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.blocks import BLOCKS

ROW_NORM = 1 / math.sqrt(3)
"""Norm of every row of A. PEFT's default, kaiming-uniform with a=√5, draws entries of variance 1/(3 d_in), so rows of
root-mean-square norm 1/√3 whatever d_in; we give every row exactly that norm."""

_WRAPPERS = re.compile(r"(^|(?<=\.))(base_model\.model|_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


class BlockWeights(NamedTuple):
    """Float64 CPU weights of one module: ``A_d [r_d, d_in]``, ``A_q [r_q, d_in]``, ``B_d [d_out, r_d]``, ``B_q``."""

    A_d: Tensor
    A_q: Tensor
    B_d: Tensor
    B_q: Tensor


Initialisation = Callable[..., BlockWeights]
"""``(d_in, d_out, deployed_rank, quarantine_rank, generator) -> BlockWeights``; one that is registered with
``needs_weight`` gets the base layer's weight ``[d_out, d_in]`` (float64, CPU) as sixth argument."""

INITIALISATIONS: dict[str, Initialisation] = {}
_NEED_WEIGHT: set[str] = set()


def register_initialisation(name: str, *, needs_weight: bool = False) -> Callable[[Initialisation], Initialisation]:
    """Decorator; raises ``UserError`` when the name is taken."""

    def decorate(function: Initialisation) -> Initialisation:
        if INITIALISATIONS.setdefault(name, function) is not function:
            raise UserError("initialisation", name, "already registered; pick another name")
        if needs_weight:
            _NEED_WEIGHT.add(name)
        return function

    return decorate


def get_initialisation(name: str) -> Initialisation:
    """The function registered as ``name``; raises ``UserError`` for an unknown one."""
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
    return _with_zero_B(rows[:r_d], rows[r_d:], d_out)


@register_initialisation("kaiming_uniform")
def kaiming_uniform(d_in: int, d_out: int, r_d: int, r_q: int, generator: torch.Generator) -> BlockWeights:
    """PEFT's default for each block: entries of A uniform in ±1/√d_in, B zero. Rows overlap by chance."""
    bound = 1 / math.sqrt(d_in)
    rows = (torch.rand(r_d + r_q, d_in, generator=generator, dtype=torch.float64) * 2 - 1) * bound
    return _with_zero_B(rows[:r_d], rows[r_d:], d_out)


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
    return _with_zero_B(rows[0 : 2 * r_d : 2], rows[1 : 2 * r_q : 2], d_out)


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


def _with_zero_B(A_d: Tensor, A_q: Tensor, d_out: int) -> BlockWeights:
    return BlockWeights(A_d, A_q, *(torch.zeros(d_out, len(A), dtype=torch.float64) for A in (A_d, A_q)))


def module_generator(name: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on the module's name and the seed alone.

    Prefixes that PEFT, FSDP, ``torch.compile`` and activation checkpointing add to the name do not count.
    """
    digest = hashlib.sha256(f"{seed}:{_WRAPPERS.sub('', name)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


@torch.no_grad()
def initialise_blocks(model: nn.Module, init: str, seed: int) -> int:
    """Write both blocks' starting weights into every adapted module of ``model``.

    The values depend on module names, shapes and ``seed`` alone: not on module order, number of processes, device or
    dtype (they are drawn and orthogonalised in float64 on the CPU, then cast). Modules whose parameters are still on
    the meta device are left alone: call again once they have storage. Sharded (DTensor) parameters get their shard,
    without communication; an initialisation that reads the base weight (``pissa_split``) gathers a sharded one, so that
    every rank must make the call, and depends on that weight as well.

    Args:
        model: A model with both adapters, wrapped or not.
        init: A name in :data:`INITIALISATIONS`.

    Returns:
        The number of modules written.

    Raises:
        UserError: Unknown ``init``, no module with both blocks, or what the initialisation refuses.
    """
    function = get_initialisation(init)
    written = 0
    for name, module in _adapted_modules(model):
        targets = [weight for side in ("lora_A", "lora_B") for weight in _block_weights(module, side)]
        base = [_base_weight(module)] if init in _NEED_WEIGHT else []
        if any(parameter.is_meta for parameter in [*targets, *base]):
            continue
        (r_d, d_in), (r_q, _), (d_out, _) = (tuple(parameter.shape) for parameter in targets[:3])
        values = function(d_in, d_out, r_d, r_q, module_generator(name, seed), *map(_whole, base))
        for parameter, value in zip(targets, values, strict=True):
            _write(parameter, value)
        written += 1
    return written


def _adapted_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = []
    for name, module in model.named_modules():
        adapters = getattr(module, "lora_A", None)
        if isinstance(adapters, nn.ModuleDict) and all(adapter in adapters for adapter in BLOCKS.values()):
            found.append((name, module))
    if not found:
        raise UserError("model", type(model).__name__, f"has no module with the adapters {list(BLOCKS.values())}")
    return found


def _block_weights(module: nn.Module, side: str) -> list[Tensor]:
    """Weights of ``side`` (``lora_A`` or ``lora_B``): deployed, quarantine."""
    adapters = cast(nn.ModuleDict, getattr(module, side))
    return [cast(nn.Linear, adapters[adapter]).weight for adapter in BLOCKS.values()]


def _base_weight(module: nn.Module) -> Tensor:
    return cast(nn.Linear, cast(LoraLayer, module).get_base_layer()).weight


def _whole(weight: Tensor) -> Tensor:
    """A weight, gathered if it is sharded, float64 on the CPU."""
    whole = getattr(weight, "full_tensor", lambda: weight)()
    return whole.detach().to("cpu", torch.float64)


def _write(parameter: Tensor, value: Tensor) -> None:
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        parameter.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    placements = parameter.placements  # type: ignore[attr-defined]
    parameter.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))


class InitialisationReport(NamedTuple):
    """What :func:`initialisation_report` measures, over all adapted modules."""

    modules: int
    deployed_row_norms: tuple[float, float]
    """Smallest and largest norm of a row of ``A_d``."""
    quarantine_row_norms: tuple[float, float]
    max_cross_cosine: float
    """Largest |cosine| between a row of ``A_d`` and a row of ``A_q`` of the same module; 0 = orthogonal blocks."""
    max_abs_B: float
    """Largest |entry| of any B; 0 = the adapted model is the base model."""


@torch.no_grad()
def initialisation_report(model: nn.Module) -> InitialisationReport:
    """Measure how well the blocks are matched in scale and separated in direction.

    Raises:
        UserError: ``model`` has no module with both blocks.
    """
    norms: tuple[list[Tensor], list[Tensor]] = ([], [])
    cosines, largest_B = [], []
    for _, module in _adapted_modules(model):
        rows = [A.double() for A in _block_weights(module, "lora_A")]
        for block_norms, A in zip(norms, rows, strict=True):
            block_norms.append(A.norm(dim=1))
        unit_d, unit_q = (nn.functional.normalize(A, dim=1) for A in rows)
        cosines.append(float((unit_d @ unit_q.t()).abs().max()))
        largest_B.extend(float(B.abs().max()) for B in _block_weights(module, "lora_B"))
    spans = [torch.cat(values) for values in norms]
    deployed, quarantine = ((float(span.min()), float(span.max())) for span in spans)
    return InitialisationReport(len(cosines), deployed, quarantine, max(cosines), max(largest_B))
