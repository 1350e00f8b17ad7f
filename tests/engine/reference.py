"""A slow, independent account of routed training: float64, one rollout at a time, dense weights, plain autograd.

It shares no code with the package or with verl: the adapters enter as one dense matrix ``W + s (g_d B_d A_d + g_q B_q
A_q)`` per linear layer, the losses are written out from their definitions, and a block's gradient is the sum over
rollouts of ``update × that rollout's own gradient``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaForCausalLM

from tests.engine.rollouts import ABSORB, ADAPTERS, ALPHA, KEEP, PLAIN, ROUTE, Loss, Rollout

Pair = tuple[float, float]

# route -> (forward gate, update mask), each (deployed, quarantine)
DEFAULT: dict[int, tuple[Pair, Pair]] = {
    KEEP: ((1, 0), (1, 0)),
    ABSORB: ((1, 1), (1, 1)),
    ROUTE: ((1, 1), (0, 1)),
}
STRICT = {**DEFAULT, ABSORB: ((1, 1), (1, 0))}
ACTIVATION_MASKING = {**DEFAULT, ROUTE: ((0, 1), (0, 1))}
HEAD_START_NOTHING = {**DEFAULT, ABSORB: ((1, 1), (0, 0))}
HEAD_START_QUARANTINE = {**DEFAULT, ABSORB: ((1, 1), (0, 1))}


def block_of(name: str) -> str:
    return "quarantine" if ".quarantine." in name else "deployed"


class Reference:
    """The model in float64 with given adapters (names as the engine has them)."""

    def __init__(self, model_dir: Path, adapters: Mapping[str, Tensor]):
        self.model = LlamaForCausalLM.from_pretrained(
            model_dir, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        self.model.requires_grad_(False)
        self.load(adapters)

    def load(self, adapters: Mapping[str, Tensor]) -> Reference:
        self.adapters = {name: value.double().requires_grad_() for name, value in adapters.items()}
        ranks = {adapter: self._first(f".lora_A.{adapter}.").shape[0] for adapter in ADAPTERS.values()}
        self.scaling = ALPHA / sum(ranks.values())
        return self

    def _first(self, part: str) -> Tensor:
        return next(value for name, value in self.adapters.items() if part in name)

    @cached_property
    def base_weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def weights(self, gate: Pair) -> dict[str, Tensor]:
        """Dense weights of every adapted layer."""
        dense = {}
        for name in self.adapters:
            module, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.default.")
            if found:
                delta = sum(
                    g * (self.adapters[name.replace("A.default", f"B.{a}")] @ self.adapters[name.replace("default", a)])
                    for g, a in zip(gate, ADAPTERS.values(), strict=True)
                )
                dense[f"{module}.weight"] = self.base_weights[f"{module}.weight"] + self.scaling * delta
        return dense

    def logits(self, tokens: Tensor, gate: Pair = (1, 1)) -> Tensor:
        """[T, vocabulary]."""
        output = functional_call(self.model, self.weights(gate), (tokens[None],), {"use_cache": False})
        return output.logits[0]

    def log_probs(self, row: Rollout, gate: Pair = (1, 1), temperature: float = 1.0) -> Tensor:
        """Of the response tokens, [R]."""
        return self._response(row, gate, temperature)[0]

    def _response(self, row: Rollout, gate: Pair, temperature: float) -> tuple[Tensor, Tensor]:
        predicting = self.logits(row.tokens, gate)[len(row.prompt) - 1 : -1] / temperature
        log_probs_RV = predicting.log_softmax(-1)
        entropy_R = -(log_probs_RV.exp() * log_probs_RV).sum(-1)
        return log_probs_RV.gather(-1, row.response[:, None]).squeeze(-1), entropy_R

    @torch.no_grad()
    def residual_stream(self, row: Rollout, gate: Pair = (1, 1)) -> list[Tensor]:
        """Hidden states [T, d] after each decoder layer, the last one before the final norm."""
        heard: list[Tensor] = []

        def keep(_module: object, _inputs: object, output: Any) -> None:
            heard.append(output[0] if isinstance(output, tuple) else output)

        last = self.model.model.layers[-1].register_forward_hook(keep)
        settings = {"use_cache": False, "output_hidden_states": True}
        output = functional_call(self.model, self.weights(gate), (row.tokens[None],), settings)
        last.remove()
        return [hidden[0] for hidden in (*output.hidden_states[1:-1], heard[0])]

    def token_losses(self, row: Rollout, gate: Pair, loss: Loss) -> Tensor:
        """[R], not yet aggregated."""
        log_probs, entropy = self._response(row, gate, loss.temperature)
        advantages, ratio = row.advantages.double(), (log_probs - row.old_log_probs.double()).exp()
        policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        policy = torch.where(advantages < 0, torch.minimum(policy, -advantages * 3.0), policy)
        difference = row.ref_log_probs.double() - log_probs
        divergence = (difference.exp() - difference - 1).clamp(-10, 10)
        return policy + loss.kl * divergence - loss.entropy * entropy

    def row_loss(self, row: Rollout, gate: Pair, loss: Loss, rows: Sequence[Rollout]) -> Tensor:
        """What ``row`` adds to the loss of the global mini-batch ``rows``."""
        mask, tokens = row.mask.double(), sum(int(other.mask.sum()) for other in rows)
        total = (self.token_losses(row, gate, loss) * mask).sum()
        total = total / (tokens if loss.aggregation == "token-mean" else mask.sum().clamp(min=1) * len(rows))
        if loss.squares:
            total = total + loss.squares * (self.log_probs(row, gate, loss.temperature) ** 2 * mask).sum() / tokens
        return total

    def gradients(
        self, rows: Sequence[Rollout], loss: Loss = PLAIN, table: Mapping = DEFAULT, weighted: bool = False
    ) -> dict[str, Tensor]:
        """Of every adapter parameter: the sum over rows of ``update × the row's own gradient``."""
        totals = {name: torch.zeros_like(value) for name, value in self.adapters.items()}
        for row in rows:
            gate, update = table[row.route]
            own = torch.autograd.grad(
                self.row_loss(row, gate, loss, rows), list(self.adapters.values()), allow_unused=True
            )
            for name, gradient in zip(self.adapters, own, strict=True):
                if gradient is not None:
                    share = update[block_of(name) == "quarantine"] * (row.weight if weighted else 1.0)
                    totals[name] += share * gradient
        return totals


def block_norm(values: Mapping[str, Tensor], block: str) -> float:
    """Euclidean norm over all tensors of a block."""
    return sum(float(v.double().square().sum()) for name, v in values.items() if block_of(name) == block) ** 0.5


def relative_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest error of any tensor's entry, relative to the largest entry of that tensor's block."""
    assert actual.keys() == expected.keys()
    scales = dict.fromkeys(ADAPTERS, 1e-30)
    for name, value in expected.items():
        scales[block_of(name)] = max(scales[block_of(name)], float(value.abs().max()))
    return max(
        float((actual[name].double() - value).abs().max()) / scales[block_of(name)] for name, value in expected.items()
    )


def of_block(state: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if block_of(name) == block}


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor], block: str) -> bool:
    """Whether a block is bitwise as it was, its optimizer state included."""
    old, new = of_block(before, block), of_block(after, block)
    return old.keys() == new.keys() and all(torch.equal(value, new[name]) for name, value in old.items())


def all_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], block: str) -> bool:
    """Whether every parameter of a block, and every tensor of its optimizer state, is another one."""
    return all(not torch.equal(value, after[name]) for name, value in of_block(before, block).items())
