"""What leaves the engine for the rollout: one joined adapter, the deployed one alone, or merged weights."""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_id

from verl_grad_routing.routing import BLOCKS, block_of, get_form, join_blocks, joined_lora_config, plain_adapters
from verl_grad_routing.training.two_adapters import DEPLOYED_ROWS

if TYPE_CHECKING:
    from verl_grad_routing.training.engine import RoutedFSDPEngine


def full_adapters(engine: RoutedFSDPEngine) -> dict[str, torch.Tensor]:
    """Both blocks' full tensors by parameter name, frozen ones too, gathered one by one (every rank takes part)."""
    full = {}
    for name, parameter in engine.module.named_parameters():
        if block_of(name) is not None:
            tensor = parameter.detach()
            full[name] = tensor.to(get_device_id()).full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
    return full


def adapter(engine: RoutedFSDPEngine) -> tuple[Iterator[tuple[str, torch.Tensor]], dict[str, Any]]:
    """(name, tensor) pairs under PEFT's single-adapter names, and the matching adapter configuration."""
    state, blocks = plain_adapters(full_adapters(engine)), engine.blocks_config
    ranks = {"deployed": blocks.deployed_rank, "quarantine": blocks.quarantine_rank}
    if len(engine.exported_blocks) == len(BLOCKS):
        tensors = join_blocks(state)
    else:
        (block,) = engine.exported_blocks
        infix = f".{BLOCKS[block]}."
        tensors = {name.replace(infix, "."): tensor for name, tensor in state.items() if block_of(name) == block}
    config = engine.module.peft_config["default"].to_dict()
    sides = get_form(blocks.form).sides
    rank = sum(ranks[block] for block in engine.exported_blocks) * sides
    config.update(joined_lora_config(rank, 0, engine.scaling))
    config[DEPLOYED_ROWS] = sides * ranks["deployed"] if "deployed" in engine.exported_blocks else 0
    return iter(tensors.items()), config


def merged(engine: RoutedFSDPEngine, stock: Callable[[], tuple]) -> Iterator[tuple[str, torch.Tensor]]:
    """verl's own merged export, with the blocks that are to be seen active; lazily, as verl's own is."""
    with _active_adapters(engine.module, [BLOCKS[block] for block in engine.exported_blocks]):
        tensors, _ = stock()
        yield from tensors


@contextmanager
def _active_adapters(module: torch.nn.Module, names: list[str]) -> Iterator[None]:
    """Which adapters a merge takes. PEFT's ``set_adapter`` would also switch ``requires_grad``; this does not."""
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = names
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active
