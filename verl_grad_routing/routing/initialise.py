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
from verl_grad_routing.routing.forms import FORMS, Form

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
    "parts_of",
    "placed_like",
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
    without communication; an initialisation or a form that reads the base weight (``pissa_split``, ``two_sided``)
    gathers a sharded one, so that every rank must make the call, and depends on that weight as well; one that reads the
    contrast of pairs depends on that too.

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
        blocks = [parts_of(module, adapter) for adapter in BLOCKS.values()]
        base = _base_weight(module) if needs.weight or _form(module).reads_weight else None
        plain = _WRAPPERS.sub("", name)
        (r_d, d_in), (r_q, _), (d_out, _) = (tuple(p.shape) for p in (blocks[0]["A"], blocks[1]["A"], blocks[0]["B"]))
        changes = [contrast.of(plain, d_in)] if contrast is not None else []  # every rank refuses alike
        if any(part.is_meta for parts in blocks for part in parts.values()) or (base is not None and base.is_meta):
            continue
        whole = None if base is None else _whole(base)
        asked = [whole] if needs.weight else []
        try:
            basis = function(d_in, d_out, r_d, r_q, module_generator(name, seed), *asked, *map(_whole, changes))
            starts = _form(module).start(basis, whole, needs.leads)
        except UserError as error:
            raise UserError(f"{error.key} ({plain})", error.value, error.fix) from None
        for parts, start in zip(blocks, starts, strict=True):
            for part, value in start.items():
                _write(parts[part], value)
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


def _form(module: nn.Module) -> Form:
    return getattr(module, "form", FORMS["lora"])


def parts_of(module: nn.Module, adapter: str) -> dict[str, Tensor]:
    """One block's parts of an adapted layer, by name."""
    found = {}
    for part in ("A", "B", *_form(module).extra_parts):
        adapters = cast(nn.ModuleDict, getattr(module, f"lora_{part}"))
        if adapter in adapters:
            found[part] = cast(nn.Linear, adapters[adapter]).weight
    return found


def _base_weight(module: nn.Module) -> Tensor:
    return cast(nn.Linear, cast(LoraLayer, module).get_base_layer()).weight


def _whole(weight: Tensor) -> Tensor:
    """A weight, gathered if it is sharded, float64 on the CPU."""
    whole = getattr(weight, "full_tensor", lambda: weight)()
    return whole.detach().to("cpu", torch.float64)


def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(placed_like(parameter, value))


def placed_like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value``, which every rank has whole, on ``parameter``'s device, in its dtype, and sharded as it is."""
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    placements = parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


class InitialisationReport(NamedTuple):
    """What :func:`initialisation_report` measures, over all adapted modules."""

    modules: int
    deployed_row_norms: tuple[float, float]
    """Smallest and largest norm of a row that the deployed block reads with."""
    quarantine_row_norms: tuple[float, float]
    max_cross_cosine: float
    """Largest |cosine| between a row of one block and a row of the other in the same module (or a frozen column);
    0 = orthogonal blocks."""
    max_abs_B: float
    """Largest |entry| of what is zero as long as the adapter is, B for plain LoRA; 0 = the adapted model is the base
    model."""
    change: str = "|B|"
    """What that is."""
    deployed_column_norms: tuple[float, float] | None = None
    """Smallest and largest norm of a frozen column, where the form has such."""
    quarantine_column_norms: tuple[float, float] | None = None

    def __str__(self) -> str:
        texts = [f"{self.modules} modules"]
        pairs = (
            (self.deployed_row_norms, self.quarantine_row_norms),
            (
                self.deployed_column_norms,
                self.quarantine_column_norms,
            ),
        )
        for what, (deployed, quarantine) in zip(("row", "frozen column"), pairs, strict=True):
            if deployed is not None and quarantine is not None:
                spans = f"deployed {_span(deployed)}, quarantine {_span(quarantine)}"
                texts.append(f"{what} norms {spans}")
        texts.append(f"cosine between blocks at most {self.max_cross_cosine:.1e}")
        return ", ".join([*texts, f"{self.change} at most {self.max_abs_B:.1e}"])


def _span(norms: tuple[float, float]) -> str:
    return f"{norms[0]:.4f} to {norms[1]:.4f}"


@torch.no_grad()
def initialisation_report(model: nn.Module) -> InitialisationReport:
    """Measure how well the blocks are matched in scale and separated in direction.

    Raises:
        UserError: ``model`` has no module with both blocks.
    """
    norms: dict[str, list[list[Tensor]]] = {"rows": [[], []], "columns": [[], []]}
    cosines, moved, changes = [], [], set()
    for _, module in _adapted_modules(model):
        form = _form(module)
        held = [parts_of(module, adapter) for adapter in BLOCKS.values()]
        blocks = [{part: value.detach().double() for part, value in parts.items()} for parts in held]
        frames = {"rows": [form.reads(parts) for parts in blocks]}
        frozen = [form.columns(parts) for parts in blocks]
        if frozen[0] is not None and frozen[1] is not None:
            frames["columns"] = [columns.t() for columns in frozen if columns is not None]
        for what, (deployed, quarantine) in frames.items():
            for found, rows in zip(norms[what], (deployed, quarantine), strict=True):
                found.append(rows.norm(dim=1))
            units = (nn.functional.normalize(rows, dim=1) for rows in (deployed, quarantine))
            cosines.append(float((next(units) @ next(units).t()).abs().max()))
        moved.extend(form.moved(parts) for parts in blocks)
        changes.add(form.change)
    deployed_rows, quarantine_rows = norms["rows"]
    report = InitialisationReport(
        len(deployed_rows),
        _extent(deployed_rows),
        _extent(quarantine_rows),
        max(cosines),
        max(moved),
        " ".join(sorted(changes)),
    )
    if not norms["columns"][0]:
        return report
    deployed_columns, quarantine_columns = map(_extent, norms["columns"])
    return report._replace(deployed_column_norms=deployed_columns, quarantine_column_norms=quarantine_columns)


def _extent(norms: list[Tensor]) -> tuple[float, float]:
    joined = torch.cat(norms)
    return float(joined.min()), float(joined.max())
