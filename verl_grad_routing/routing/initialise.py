"""How the two blocks start: a basis by name written into a model, deterministic per module name and seed.

Legend: ``d_in``, ``d_out`` sizes of the adapted layer; ``r_d``, ``r_q`` ranks of the blocks.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import contrast_bases  # noqa: F401  (importing registers them)
from verl_grad_routing.routing.bases import (
    INITIALISATIONS,
    ROW_NORM,
    BlockWeights,
    Initialisation,
    Needs,
    get_initialisation,
    needs_of,
    register_initialisation,
    right_singular_vectors,
)
from verl_grad_routing.routing.blocks import BLOCKS
from verl_grad_routing.routing.contrast import COMMAND, Contrast
from verl_grad_routing.routing.contrast import KEY as CONTRAST_KEY

__all__ = [
    "INITIALISATIONS",
    "ROW_NORM",
    "BlockWeights",
    "Initialisation",
    "InitialisationReport",
    "check_contrast",
    "get_initialisation",
    "initialisation_report",
    "initialise_blocks",
    "module_generator",
    "needs_of",
    "register_initialisation",
    "right_singular_vectors",
]

_WRAPPERS = re.compile(r"(^|(?<=\.))(base_model\.model|_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


def module_generator(name: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on the module's name and the seed alone.

    Prefixes that PEFT, FSDP, ``torch.compile`` and activation checkpointing add to the name do not count.
    """
    digest = hashlib.sha256(f"{seed}:{_WRAPPERS.sub('', name)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


@torch.no_grad()
def initialise_blocks(model: nn.Module, init: str, seed: int, contrast: Contrast | None = None) -> int:
    """Write both blocks' starting weights into every adapted module of ``model``.

    The values depend on module names, shapes and ``seed`` alone: not on module order, number of processes, device or
    dtype (they are drawn and orthogonalised in float64 on the CPU, then cast). Modules whose parameters are still on
    the meta device are left alone: call again once they have storage. Sharded (DTensor) parameters get their shard,
    without communication; an initialisation that reads the base weight (``pissa_split``) gathers a sharded one, so that
    every rank must make the call, and depends on that weight as well; one that reads the contrast of pairs depends on
    that too.

    Args:
        model: A model with both adapters, wrapped or not.
        init: A name in :data:`INITIALISATIONS`.
        contrast: What the pairs change in every layer's inputs, for an initialisation that reads it.

    Returns:
        The number of modules written.

    Raises:
        UserError: Unknown ``init``, no module with both blocks, a contrast that is missing, of another model or of no
            use, or what the initialisation refuses (names the module).
    """
    function, needs = get_initialisation(init), check_contrast(init, contrast is not None)
    written = 0
    for name, module in _adapted_modules(model):
        targets = [weight for side in ("lora_A", "lora_B") for weight in _block_weights(module, side)]
        base = [_base_weight(module)] if needs.weight else []
        plain = _WRAPPERS.sub("", name)
        changes = [contrast.of(plain, targets[0].shape[1])] if contrast is not None else []  # every rank refuses alike
        if any(parameter.is_meta for parameter in [*targets, *base]):
            continue
        (r_d, d_in), (r_q, _), (d_out, _) = (tuple(parameter.shape) for parameter in targets[:3])
        try:
            values = function(d_in, d_out, r_d, r_q, module_generator(name, seed), *map(_whole, [*base, *changes]))
        except UserError as error:
            raise UserError(f"{error.key} ({plain})", error.value, error.fix) from None
        for parameter, value in zip(targets, values, strict=True):
            _write(parameter, value)
        written += 1
    return written


def check_contrast(init: str, given: bool) -> Needs:
    """What ``init`` reads. Raises ``UserError`` when that and the presence of a contrast do not fit."""
    needs = needs_of(init)
    if needs.contrast and not given:
        raise UserError(CONTRAST_KEY, None, f"init {init} reads pairs from a file; make one: {COMMAND}")
    if given and not needs.contrast:
        fix = f"two bases on one block: {init} has its own; unset this, or set init to corda, scorda or scorda_rev"
        raise UserError(CONTRAST_KEY, "given", fix)
    return needs


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

    def __str__(self) -> str:
        deployed, quarantine = (f"{low:.4f} to {high:.4f}" for low, high in self[1:3])
        norms = f"row norms deployed {deployed}, quarantine {quarantine}"
        largest = f"cosine between blocks at most {self.max_cross_cosine:.1e}, |B| at most {self.max_abs_B:.1e}"
        return f"{self.modules} modules, {norms}, {largest}"


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
