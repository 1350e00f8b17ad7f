"""Names, ranks and state dicts of the two blocks: pure functions, no model needed.

The blocks are two PEFT adapters, ``default`` (deployed) and ``quarantine``. Towards a rollout engine they are **one**
adapter: rows of A and columns of B concatenated, the deployed block first, which is the same function because
``[B_d, B_q] [A_d; A_q] = B_d A_d + B_q A_q``. For deployment it is the deployed block alone. Blocks of another form
than plain LoRA (``forms``) are made plain adapters first.

Legend: ``r_d``, ``r_q`` ranks of the blocks; state dicts map parameter names to tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.forms import FORMS, form_of

DEPLOYED_ADAPTER = "default"
QUARANTINE_ADAPTER = "quarantine"
BLOCKS = {"deployed": DEPLOYED_ADAPTER, "quarantine": QUARANTINE_ADAPTER}
"""Block name to PEFT adapter name."""

_BLOCK_OF_ADAPTER = {adapter: block for block, adapter in BLOCKS.items()}
_PARAMETER = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[A-Za-z]\w*)\.(?P<adapter>[^.]+)\.weight$")
_PLAIN_PARAMETER = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight$")  # in files without adapter
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_ranks() -> tuple[int, ...]:
    """Adapter ranks that vLLM accepts as ``max_lora_rank`` (vllm.config.lora.MaxLoRARanks, v0.24 to v0.28)."""
    return _VLLM_RANKS


def check_ranks(deployed_rank: int, quarantine_rank: int) -> int:
    """The total rank of two blocks, each an integer of at least 1. Raises ``UserError`` otherwise."""
    for key, rank in (("deployed_rank", deployed_rank), ("quarantine_rank", quarantine_rank)):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UserError(key, rank, "give an integer of at least 1")
    return deployed_rank + quarantine_rank


def check_total_rank(total: int, sides: int = 1) -> int:
    """``total`` if two blocks of that total rank can be one vLLM adapter, of ``sides`` times that rank.

    Raises:
        UserError: vLLM does not take it (odd totals among them); names the next total that it does.
    """
    accepted = [rank // sides for rank in _VLLM_RANKS if rank >= 2 * sides and rank % sides == 0]
    if total in accepted:
        return total
    larger = [rank for rank in accepted if rank > total]
    fix = f"use {larger[0]}, the next" if larger else f"use {accepted[-1]}, the largest"
    what = "total rank" if sides == 1 else f"total rank whose adapter, {sides} times as large, is one"
    raise UserError("deployed_rank + quarantine_rank", total, f"{fix} {what} that vLLM takes")


def joined_lora_config(deployed_rank: int, quarantine_rank: int, scaling: float) -> dict[str, Any]:
    """``r`` and ``lora_alpha`` of the joined adapter (or of one block, with the other's rank 0), scaling unchanged."""
    total = deployed_rank + quarantine_rank
    alpha = scaling * total
    return {"r": total, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}


def block_of(parameter_name: str) -> str | None:
    """``'deployed'``, ``'quarantine'``, or ``None`` for a parameter of neither; frozen parts count as their block's."""
    match = _PARAMETER.match(parameter_name)
    return _BLOCK_OF_ADAPTER.get(match["adapter"]) if match and match["part"] in _parts() else None


def block_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What each block trains, in the model's order: ``{'deployed': [...], 'quarantine': [...]}``."""
    parameters: dict[str, list[nn.Parameter]] = {block: [] for block in BLOCKS}
    for name, parameter in model.named_parameters():
        block = block_of(name)
        if block is not None and parameter.requires_grad:
            parameters[block].append(parameter)
    return parameters


def plain_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with both blocks as plain adapters, whatever their form; a plain one's tensors are the ones given."""
    parts, plain = _parts_of(state), dict(state)
    for (module, adapter), held in parts.items():
        form = form_of(held)
        if form.extra_parts:
            for part in held:
                del plain[_name(module, part, adapter)]
            for side, tensor in zip("AB", form.adapter(held), strict=True):
                plain[_name(module, side, adapter)] = tensor
    return plain


def is_zero(state: Mapping[str, Tensor], block: str) -> bool:
    """Whether ``block`` adds nothing to any layer, as it does before it has been trained."""
    own = [held for (_, adapter), held in _parts_of(state).items() if adapter == BLOCKS[block]]
    with torch.no_grad():
        return all(form_of(held).moved(held) == 0 for held in own)


def _parts_of(state: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """``{(module, adapter): {part: tensor}}`` of both blocks."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _PARAMETER.match(name)
        if match and block_of(name) is not None:
            found.setdefault((match["module"], match["adapter"]), {})[match["part"]] = tensor
    return found


def _parts() -> set[str]:
    return {"A", "B"}.union(*(form.extra_parts for form in FORMS.values()))


def join_blocks(
    state: Mapping[str, Tensor], adapter: str | None = None, scalings: tuple[float, float] | None = None
) -> dict[str, Tensor]:
    """Both blocks as one adapter, of rank ``r_d + r_q`` (twice that for ``two_sided``).

    Args:
        state: Parameters with both blocks; entries of the base model are left out of the result.
        adapter: Adapter name to write into the result's names; ``None`` writes none, as adapter files have it.
        scalings: (deployed, quarantine) scalings to fold into B when they differ; the joined adapter's scaling is
            then 1. ``None``: both share one scaling, which stays outside.

    Raises:
        UserError: A module has one block only, or an adapter parameter is of neither block.
    """
    joined = {}
    for (module, side), blocks in _grouped(state).items():
        deployed, quarantine = blocks[DEPLOYED_ADAPTER], blocks[QUARANTINE_ADAPTER]
        if scalings is not None and side == "B":
            deployed, quarantine = deployed * scalings[0], quarantine * scalings[1]
        joined[_name(module, side, adapter)] = torch.cat((deployed, quarantine), dim=0 if side == "A" else 1)
    return joined


def deployed_only(state: Mapping[str, Tensor], adapter: str | None = None) -> dict[str, Tensor]:
    """The deployed block alone: what is left at deployment. Arguments and errors as in :func:`join_blocks`."""
    return {_name(module, side, adapter): b[DEPLOYED_ADAPTER] for (module, side), b in _grouped(state).items()}


def quarantine_only(state: Mapping[str, Tensor], adapter: str | None = None) -> dict[str, Tensor]:
    """The quarantine alone: a control. Arguments and errors as in :func:`join_blocks`."""
    return {_name(module, side, adapter): b[QUARANTINE_ADAPTER] for (module, side), b in _grouped(state).items()}


def split_blocks(joined: Mapping[str, Tensor], deployed_rank: int) -> dict[str, Tensor]:
    """Inverse of :func:`join_blocks` (without ``scalings``): names get the adapters of both blocks.

    Raises:
        UserError: A name is no LoRA weight, or ``deployed_rank`` leaves a block empty.
    """
    state = {}
    for name, tensor in joined.items():
        match = _PLAIN_PARAMETER.match(name)
        if match is None:
            raise UserError("adapter state", name, "expected names ending in lora_A.weight or lora_B.weight")
        dim = 0 if match["side"] == "A" else 1
        if not 0 < deployed_rank < tensor.shape[dim]:
            raise UserError("deployed_rank", deployed_rank, f"give 1 to {tensor.shape[dim] - 1} for {name}")
        for adapter, part in zip(BLOCKS.values(), tensor.tensor_split([deployed_rank], dim), strict=True):
            state[_name(match["module"], match["side"], adapter)] = part.contiguous()
    return state


def _name(module: str, side: str, adapter: str | None) -> str:
    return f"{module}.lora_{side}.{adapter}.weight" if adapter else f"{module}.lora_{side}.weight"


def _grouped(state: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """``{(module, 'A' or 'B'): {adapter: tensor}}``, both blocks present in each."""
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in plain_adapters(state).items():
        if ".lora_" not in name:
            continue
        match = _PARAMETER.match(name)
        if match is None or block_of(name) is None or match["part"] not in ("A", "B"):
            raise UserError("adapter state", name, f"expected LoRA weights of the adapters {list(BLOCKS.values())}")
        groups.setdefault((match["module"], match["part"]), {})[match["adapter"]] = tensor
    if not groups:
        raise UserError("adapter state", f"{len(state)} entries", "none is a LoRA weight of either block")
    for (module, side), blocks in groups.items():
        missing = set(BLOCKS.values()) - set(blocks)
        if missing:
            raise UserError("adapter state", f"{module}.lora_{side}", f"adapter {missing.pop()!r} is missing there")
    return groups
