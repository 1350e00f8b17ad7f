"""Random models small enough for any test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SMALLEST = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A Llama of two layers, 16 wide unless ``config`` says otherwise; leaves torch's generator where it ends."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SMALLEST, **config})).eval()


def lively_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """The same in float64, its weights of order ``1/√inputs``, so that every layer matters."""
    made = tiny_llama(seed, **config).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return made
