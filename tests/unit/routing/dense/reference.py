"""A slow, independent account of dense blocks: float64, one rollout at a time, plain transformers and autograd.

It shares no code with the package. A gate enters as zeros in the down and o projections' columns, Cloud's alpha as
their own formula ``α h + (1 - α) sg(h)`` on units' outputs, and every parameter's gradient is the sum over rollouts of
that rollout's own gradient times a mask written out entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HIDDEN, UNITS, HEADS, GROUPS, SIZE, LAYERS, VOCABULARY = 16, 12, 4, 2, 4, 3, 23
CHOSEN = {"layers": (0, 2), "units": (1, 2, 7), "heads": (2, 3)}  # heads 2 and 3 are group 1


class Norm(torch.nn.Module):
    """transformers' RMS norm goes through float32."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),  # biases at q, k and v only
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),  # norms of every head's queries and keys
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}


def make_model(seed: int = 0, family: str = "llama") -> Any:
    """A random decoder in float64 with grouped queries and all the biases that it can have."""
    config_class, model_class, more = MODELS[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=UNITS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
        max_position_embeddings=64,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        **more,
    )
    model = model_class(config).double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if name.endswith("norm"):
                setattr(module, name, Norm(len(child.weight)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(1 + 0.2 * drawn if "norm" in name else drawn * (0.5 if p.ndim == 1 else p.shape[-1] ** -0.5))
    return model


@dataclass(frozen=True)
class Row:
    """One rollout: tokens [T], a weight of every token's loss [T], its masks for (deployed, quarantine)."""

    tokens: Tensor
    weights: Tensor
    gate: tuple[float, float]
    update: tuple[float, float]
    alpha: tuple[float, float] | Tensor = (1.0, 1.0)  # or [T, 2]


def draw_rows(masks: Sequence[tuple], seed: int = 1) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for gate, update, *alpha in masks:
        length = int(torch.randint(2, 8, (), generator=generator))
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        rows.append(Row(tokens, torch.randn(length, generator=generator, dtype=torch.float64), gate, update, *alpha))
    return rows


def quarantine_of(name: str, shape: torch.Size) -> Tensor:
    """1 at the quarantine's entries of a parameter."""
    flags = torch.zeros(shape, dtype=torch.float64)
    if not any(f"layers.{layer}." in name for layer in CHOSEN["layers"]):
        return flags
    if "gate_proj" in name or "up_proj" in name:
        flags[list(CHOSEN["units"])] = 1
    if "down_proj.weight" in name:
        flags[:, list(CHOSEN["units"])] = 1
    if "q_proj" in name:
        flags[8:16] = 1  # heads 2 and 3 of size 4
    if "k_proj" in name or "v_proj" in name:
        flags[4:8] = 1  # group 1
    if "o_proj.weight" in name:
        flags[:, 8:16] = 1
    return flags


def row_loss(logits: Tensor, row: Row) -> Tensor:
    return (logits.log_softmax(-1)[torch.arange(len(row.tokens)), row.tokens] * row.weights).sum()


WEIGHTS = (  # of units, entry by entry: (layers, MLP units, heads, weight)
    ((0, 2), (0, 2), (), 0.5),
    ((2,), (7, 8), (1, 2), -1.5),
    ((0,), (), (3,), 1.0),
)


def unit_weights(name: str, count: int) -> Tensor:
    """The weight of every input of the projection ``name``; heads are of 4 inputs."""
    found = torch.zeros(count, dtype=torch.float64)
    for layers, units, heads, weight in WEIGHTS:
        if any(f"layers.{layer}." in name for layer in layers):
            if "down_proj" in name:
                found[list(units)] = weight
            else:
                for head in heads:
                    found[4 * head : 4 * head + 4] = weight
    return found


def own_gradients(model: Any, row: Row, weighed: bool = False) -> dict[str, Tensor]:
    """Of one rollout alone, by plain autograd, under its gate and its alpha; ``weighed``: alpha of every unit alone."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    used = dict(parameters)
    for name, p in parameters.items():
        if name.endswith(("down_proj.weight", "o_proj.weight")) and quarantine_of(name, p.shape).any():
            flags = quarantine_of(name, p.shape)
            used[name] = p * (flags * row.gate[1] + (1 - flags) * row.gate[0])

    def weigh(name: str):
        flags = quarantine_of(f"{name}.weight", model.get_submodule(name).weight.shape)[0]
        alpha_T2 = torch.as_tensor(row.alpha, dtype=torch.float64).expand(len(row.tokens), 2)

        def hook(_module, inputs):
            alpha = alpha_T2[:, 1:] * flags + alpha_T2[:, :1] * (1 - flags)
            if weighed:
                alpha = alpha + (1 - alpha) * unit_weights(name, len(flags))
            return (alpha * inputs[0] + (1 - alpha) * inputs[0].detach(),)

        return hook

    names = [f"model.layers.{i}.{m}" for i in CHOSEN["layers"] for m in ("mlp.down_proj", "self_attn.o_proj")]
    hooks = [model.get_submodule(name).register_forward_pre_hook(weigh(name)) for name in names]
    try:
        logits = functional_call(model, used, (row.tokens[None],), {"use_cache": False}).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    found = torch.autograd.grad(row_loss(logits, row), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def expected_gradients(
    model: Any, rows: Sequence[Row], shared=lambda name: False, weighed: bool = False
) -> dict[str, Tensor]:
    """The sum over rollouts of the allowed parts of their own gradients."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        for name, own in own_gradients(model, row, weighed).items():
            flags = quarantine_of(name, own.shape)
            allowed = flags * row.update[1] + (1 - flags) * row.update[0]
            totals[name] += own * (max(row.update) if shared(name) else allowed)
    return totals


def packed(rows: Sequence[Row]) -> dict[str, Tensor]:
    """All rollouts in one row of the model, each attending to itself only."""
    lengths = [len(row.tokens) for row in rows]
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    seen = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    blocked = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    return {
        "input_ids": torch.cat([row.tokens for row in rows])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "attention_mask": blocked[None, None],
    }


def masks_of(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Gate, update and alpha of every packed token, [1, T, 2]."""

    def tokens(values) -> Tensor:
        return torch.cat([torch.as_tensor(v).float().expand(len(r.tokens), 2) for v, r in values])[None]

    update = tokens((row.update, row) for row in rows)
    return {
        "forward_gate": tokens((row.gate, row) for row in rows),
        "update_mask": update,
        "activation_gradient": torch.cat(
            [torch.as_tensor(row.alpha, dtype=torch.float64).expand(len(row.tokens), 2) for row in rows]
        )[None],
        "shared_mask": update.amax(-1, keepdim=True).expand_as(update),
    }
