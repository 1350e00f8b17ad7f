"""Where the bottlenecks sit, and their frozen bases: singular vectors of the base weight, or an adapter drawn by seed.

Legend: ``M`` modules, ``r`` rank, ``I`` and ``O`` a layer's input and output sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import probed_modules
from verl_grad_routing.fingerprints.probe import KEY
from verl_grad_routing.fingerprints.streams import key_of


@dataclass(frozen=True)
class Bottleneck:
    """Frozen bottlenecks on linear layers; all of them follow from these values and the base weights.

    Attributes:
        layers: Decoder layers that carry them, counted from 1.
        targets: Names of the linear layers in them.
        rank: r, the same everywhere.
        basis: A name in ``BASES``.
        seed: Of a basis that is drawn.
    """

    layers: tuple[int, ...]
    targets: tuple[str, ...]
    rank: int
    basis: str
    seed: int = 0


class ModuleBasis(NamedTuple):
    """Bases of one module, float32: ``read_rI`` (A, rows) and ``write_Or`` (B, columns)."""

    read_rI: Tensor
    write_Or: Tensor


Basis = Callable[[Tensor, int, torch.Generator], ModuleBasis]
"""``(base weight [d_out, d_in] float64, rank, CPU generator of the module) -> ModuleBasis`` on the weight's device."""

BASES: dict[str, Basis] = {}


def register_basis(name: str) -> Callable[[Basis], Basis]:
    """Decorator; raises ``UserError`` when the name is taken."""

    def decorate(function: Basis) -> Basis:
        if BASES.setdefault(name, function) is not function:
            raise UserError("basis", name, "already registered; pick another name")
        return function

    return decorate


@register_basis("svd")
def singular_vectors(weight_OI: Tensor, rank: int, generator: torch.Generator) -> ModuleBasis:
    """The first right and left singular vectors of the base weight.

    The gate's gradient is then that of the singular values: ``W + U diag(c) Vᵀ`` (wassname/grpo_proj2@25ad306,
    src/projected_grpo/antipasto.py:55-59). A joint change of sign of a pair of vectors changes no gradient coordinate.
    """
    from verl_grad_routing.routing.initialise import right_singular_vectors  # imports PEFT

    del generator
    read_rI = right_singular_vectors(weight_OI, rank)
    write_Or = weight_OI @ read_rI.t()
    return ModuleBasis(read_rI.float(), (write_Or / write_Or.norm(dim=0)).float())


@register_basis("lora")
def drawn_adapter(weight_OI: Tensor, rank: int, generator: torch.Generator) -> ModuleBasis:
    """An adapter as vGROUT draws it, A ~ N(0, 1/d_in), B ~ N(0, 1/2r): wassname/vGROUT_pub@c067218, lora.py:122-130."""
    d_out, d_in = weight_OI.shape
    read_rI = torch.randn(rank, d_in, generator=generator, dtype=torch.float64) / math.sqrt(d_in)
    write_Or = torch.randn(d_out, rank, generator=generator, dtype=torch.float64) / math.sqrt(2 * rank)
    return ModuleBasis(*(side.float().to(weight_OI.device) for side in (read_rI, write_Or)))


@torch.no_grad()
def bases_of(layers: list[nn.Module], bottleneck: Bottleneck) -> dict[str, ModuleBasis]:
    """Bases of every chosen module by name, in the model's order, on the device of its weight.

    A sharded base weight is gathered, so every rank must make the call. Adapters do not count.

    Args:
        layers: All decoder layers, in order, whatever wraps the model.

    Raises:
        UserError: No such layer or target, or a rank above what the layer has.
    """
    found = {}
    for name, module in probed_modules(layers, bottleneck).items():
        weight: Tensor = module.weight  # type: ignore[assignment]  # of PEFT's layers too: the base layer's
        whole = getattr(weight, "full_tensor", lambda weight=weight: weight)().detach().double()
        if bottleneck.rank > min(whole.shape):
            fix = f"{name} is {whole.shape[0]} x {whole.shape[1]}; give at most {min(whole.shape)}, or leave it out"
            raise UserError(f"{KEY}.rank", bottleneck.rank, fix)
        generator = torch.Generator().manual_seed(key_of("bottleneck", bottleneck.seed, name))
        found[name] = BASES[bottleneck.basis](whole, bottleneck.rank, generator)
    return found


def digest(bases: Mapping[str, ModuleBasis]) -> Tensor:
    """One number per module, float64 [M], that tells bases apart; blind to what gradient coordinates are blind to.

    Two machines' linear algebra agrees in it but for rounding; other base weights do not.
    """
    numbers = []
    for read_rI, write_Or in bases.values():
        left = torch.cos(torch.arange(write_Or.shape[0], dtype=torch.float64, device=write_Or.device))
        right = torch.cos(torch.arange(read_rI.shape[1], dtype=torch.float64, device=read_rI.device))
        order = torch.arange(1, len(read_rI) + 1, dtype=torch.float64, device=read_rI.device)
        numbers.append((order * (read_rI.double() @ right) * (write_Or.double().t() @ left)).sum().cpu())
    return torch.stack(numbers)
