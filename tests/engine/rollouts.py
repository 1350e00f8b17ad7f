"""Plain data that the processes under test and the reference share: a tiny model, adapters, rollouts, losses.

Nothing here knows verl or the package's engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

LAYERS, HIDDEN, VOCABULARY = 3, 64, 48
ALPHA = 12  # LoRA's alpha; the scaling is ALPHA / total rank
RANKS = {"equal": (4, 4), "unequal": (5, 2)}
ADAPTERS = {"deployed": "default", "quarantine": "quarantine"}
KEEP, ABSORB, ROUTE = 0, 1, 2


@dataclass(frozen=True)
class Rollout:
    """One row. Prompt [P] and response [R] tokens; everything else is [R] or one number."""

    prompt: Tensor
    response: Tensor
    mask: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    route: int
    weight: float = 1.0
    confession: bool = False
    padding: bool = False  # verl's own, told apart where confessions are
    off: bool = False  # sampled with the quarantine off
    token_routes: tuple[int, ...] | None = None  # of the response's tokens; then ``route`` is that of all else
    token_weights: tuple[float, ...] | None = None  # at every position, of the token that is predicted there

    @property
    def tokens(self) -> Tensor:
        return torch.cat((self.prompt, self.response))

    def scaled(self, factor: float) -> Rollout:
        return replace(self, advantages=self.advantages * factor)

    def silent(self) -> Rollout:
        """Without a token that counts, as a padding row is."""
        return replace(self, mask=torch.zeros_like(self.mask))


@dataclass(frozen=True)
class Loss:
    """What the actor's configuration says about the loss (clip ratios are verl's defaults)."""

    aggregation: str = "token-mean"
    kl: float = 0.0
    entropy: float = 0.0
    temperature: float = 1.0
    squares: float = 0.0  # coefficient of a test hook's extra term: mean over all counting tokens of log-prob ** 2


PLAIN = Loss()
RICH = Loss(aggregation="seq-mean-token-mean", kl=0.3, entropy=0.05, temperature=0.8)


@dataclass(frozen=True)
class Inputs:
    """Everything that a world of processes reads from disk."""

    model_dir: Path
    adapters: dict[str, dict[str, Tensor]]  # "equal" / "unequal" -> engine's parameter name -> float32
    rollouts: list[Rollout]


def routed(rollouts: list[Rollout], *routes: int) -> list[Rollout]:
    """The same rows with these routes, repeated as often as needed."""
    return [replace(row, route=routes[i % len(routes)]) for i, row in enumerate(rollouts)]


def with_token_routes(rollouts: list[Rollout], routes: tuple[int, ...] = (KEEP, ABSORB, ROUTE)) -> list[Rollout]:
    """The same rows with routes of their tokens, drawn from ``routes``, and another one elsewhere."""
    generator = torch.Generator().manual_seed(11)

    def draw(count: int) -> list[int]:
        return [routes[i] for i in torch.randint(len(routes), (count,), generator=generator).tolist()]

    return [replace(row, route=draw(1)[0], token_routes=tuple(draw(len(row.response)))) for row in rollouts]


def with_token_weights(rollouts: list[Rollout]) -> list[Rollout]:
    """The same rows with a weight in [0, 1] for every position."""
    generator = torch.Generator().manual_seed(12)
    return [
        replace(row, token_weights=tuple(torch.rand(len(row.tokens), generator=generator).tolist())) for row in rollouts
    ]


def write_model(folder: Path) -> Path:
    """A random Llama with biases and logits of order one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else drawn)
    model.save_pretrained(folder)
    return folder


def draw_adapters(model: torch.nn.Module, ranks: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Values for every adapter parameter of every linear layer but the head, B not zero."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        for adapter, rank in zip(ADAPTERS.values(), ranks, strict=True):
            for side, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                key = f"base_model.model.{name}.lora_{side}.{adapter}.weight"
                values[key] = torch.randn(shape, generator=generator) * (0.1 if side == "A" else 0.3)
    return values


def draw_rollouts(log_probs_of, count: int = 12, seed: int = 3) -> list[Rollout]:
    """Rows of all routes and many lengths: responses of one token, masked tokens inside, one row without any.

    Args:
        log_probs_of: Function of (prompt, response) that gives the model's own log-probs [R], so that ratios are
            near one and some of them clipped.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        prompt_length = int(torch.randint(2, 10, (), generator=generator))
        response_length = 1 if index == 4 else int(torch.randint(2, 10, (), generator=generator))
        prompt = torch.randint(3, VOCABULARY, (prompt_length,), generator=generator)
        response = torch.randint(3, VOCABULARY, (response_length,), generator=generator)
        mask = torch.ones(response_length, dtype=torch.long)
        if index in (5, 8):
            mask[response_length // 2] = 0
        if index == count - 2:
            mask[:] = 0
        own = log_probs_of(prompt, response)
        noise = torch.randn(2, response_length, generator=generator)
        advantage = torch.randn((), generator=generator) + 0.2 * torch.randn(response_length, generator=generator)
        old, ref = (own + 0.15 * noise[0]).float(), (own + 0.3 * noise[1]).float()
        rows.append(Rollout(prompt, response, mask, old, ref, advantage, route=index % 3, weight=(1 + index % 4) / 4))
    return rows
