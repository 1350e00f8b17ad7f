"""The base model, and the model as it was trained: base, both blocks, our kernel, the checkpoint's parameters.

Everything is computed in float32 on the CPU, whatever the run's dtype was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from verl_grad_routing.deploy.checkpoint import Layout
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import RoutingContext, add_blocks

_WRAPPER = "base_model.model."


def load_model(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal language model from a folder or a hub name, in ``dtype``, for inference.

    Raises:
        UserError: transformers cannot load it.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise _cannot_load(path, error) from None


def saved_dtype(path: str) -> torch.dtype:
    """The dtype that the model's configuration names; float32 when it names none."""
    try:
        dtype = AutoConfig.from_pretrained(path).dtype
    except (OSError, ValueError) as error:
        raise _cannot_load(path, error) from None
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _cannot_load(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError("base_model", path, f"transformers cannot load it ({reason}); name the base model's folder")


def recorded_name(path: str) -> str:
    """How files name the base model: a folder by its absolute path, a hub name as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def check_base(base: nn.Module, state: Mapping[str, Tensor], path: str) -> int:
    """Compare the frozen weights that the checkpoint holds with ``base``'s, bit for bit in the checkpoint's dtype.

    Returns:
        The number of tensors compared; 0 for a checkpoint that holds the adapters alone.

    Raises:
        UserError: ``base`` is not the model that was trained on.
    """
    own = base.state_dict()
    compared = 0
    for name in state:
        if ".lora_" in name:
            continue
        plain = name.removeprefix(_WRAPPER).replace(".base_layer.", ".")
        saved = state[name]
        if plain not in own or own[plain].shape != saved.shape or not torch.equal(own[plain].to(saved.dtype), saved):
            fix = f"its {plain} is not the checkpoint's: not the model that was trained on; name that one as base_model"
            raise UserError("base_model", path, fix)
        compared += 1
    return compared


def training_model(base: nn.Module, layout: Layout, adapters: Mapping[str, Tensor]) -> tuple[PeftModel, RoutingContext]:
    """The model that was trained, and its switch ``ablated``.

    Args:
        base: The base model in float32; it becomes part of the result.
        adapters: Parameters of both blocks, float32.

    Raises:
        UserError: The parameters do not fit the model or the layout.
    """
    model, context = add_blocks(
        base,
        deployed_rank=layout.deployed_rank,
        quarantine_rank=layout.quarantine_rank,
        scaling=layout.scaling,
        target_modules=target_modules(base, adapted_modules(adapters)),
        init=None,  # loaded below
        form=layout.form,
    )
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if ".lora_" in name}
    for name in sorted(own.keys() | adapters.keys()):
        saved = adapters[name].shape if name in adapters else None
        if saved != own.get(name):
            fix = f"the base model with the checkpoint's layout has {_plain(own.get(name))} there"
            raise UserError(f"CHECKPOINT ({name})", _plain(saved), fix)
    model.load_state_dict(dict(adapters), strict=False)
    return model.eval(), context


def _plain(shape: torch.Size | None) -> Any:
    return None if shape is None else tuple(shape)


def adapted_modules(adapters: Iterable[str]) -> set[str]:
    """Names in the base model of the modules that the adapters' parameters belong to."""
    return {name.removeprefix(_WRAPPER).partition(".lora_")[0] for name in adapters}


def target_modules(base: nn.Module, module_names: set[str]) -> list[str]:
    """PEFT's ``target_modules`` for exactly ``module_names``: last name parts if these mean no other module.

    Raises:
        UserError: The base model has no such module.
    """
    present = {name for name, _ in base.named_modules() if name}
    unknown = sorted(module_names - present)
    if unknown:
        raise UserError("base_model", type(base).__name__, f"has no module {unknown[0]}, which the checkpoint adapts")
    suffixes = {name.rpartition(".")[2] for name in module_names}
    if {name for name in present if name.rpartition(".")[2] in suffixes} == module_names:
        return sorted(suffixes)
    return sorted(module_names)
