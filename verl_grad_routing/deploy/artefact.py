"""The two kinds of files: a PEFT adapter folder, and a merged Hugging Face model folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl_grad_routing.deploy.checkpoint import Layout
from verl_grad_routing.deploy.models import load_model
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import deployed_only, join_blocks, joined_lora_config, quarantine_only

ADAPTER_FILE = "adapter_model.safetensors"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt")
_CONFIGURATIONS = ("config.json", "generation_config.json")


def write_adapter(
    folder: Path, adapters: Mapping[str, Tensor], layout: Layout, blocks: str, base_model: str, targets: list[str]
) -> None:
    """One plain LoRA adapter, ``adapter_config.json`` and ``adapter_model.safetensors``, for PEFT and vLLM.

    Args:
        adapters: Float32 parameters of both blocks, by the training model's names.
        blocks: ``deployed``: that block alone, rank r_d. ``quarantine``: that one, rank r_q. ``both``: rows of A and
            columns of B joined, rank r_d + r_q. Two-sided blocks: twice as much.
        base_model: Written as ``base_model_name_or_path``.
        targets: ``target_modules``.
    """
    config = LoraConfig(
        **joined_lora_config(layout.rank_of(blocks), 0, layout.scaling),
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.target_modules = targets  # PEFT made a set of it; the file's order should not change from run to run
    config.save_pretrained(str(folder))
    chosen = {"both": join_blocks, "deployed": deployed_only, "quarantine": quarantine_only}[blocks]
    tensors = chosen(adapters)
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(contiguous, folder / ADAPTER_FILE, metadata={"format": "pt"})


def load_adapted(base_model: str, adapter: Path) -> PeftModel:
    """The adapter over its base model in float32, by plain transformers and PEFT."""
    return PeftModel.from_pretrained(load_model(base_model), str(adapter)).eval()


def merge(adapted: PeftModel) -> PreTrainedModel:
    """The plain model with ``W + scaling B A`` as its weights, in the dtype of ``adapted``."""
    return adapted.merge_and_unload(safe_merge=True)  # type: ignore[operator]


def write_model(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> nn.Module:
    """Weights in ``dtype``, configuration and generation configuration; returns the model as plain transformers
    loads it from there, in float32.

    Raises:
        UserError: What is loaded is not, bit for bit, what was written.
    """
    written = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.to(dtype).save_pretrained(str(folder))  # type: ignore[arg-type]
    loaded = load_model(str(folder), dtype)
    own = loaded.state_dict()
    for name, tensor in written.items():
        if name not in own or not torch.equal(own[name], tensor):
            raise UserError(f"model.safetensors ({name})", str(dtype), "is not what was written; nothing was kept")
    del loaded, own, written
    return load_model(str(folder))


def copy_tokenizer(actor: Path, folder: Path) -> list[str]:
    """Copy what verl saved beside the model's configuration: tokenizer, processor, chat template; returns the names."""
    return copy_beside(actor / "huggingface", folder)


def copy_beside(model: Path, folder: Path) -> list[str]:
    """Copy a model folder's files but weights, configurations and model card; returns the names."""
    copied = []
    for path in sorted(model.glob("*")):
        if path.is_file() and path.name not in (*_CONFIGURATIONS, "README.md") and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    return copied
