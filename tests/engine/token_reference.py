"""What routes of tokens mean, from their definition: every position of a row has parameters of its own.

In float64, one rollout at a time, each parameter is copied once for every position of the row; position p uses copy p
and nothing else. The gradient of copy p is what that *use* of the parameter contributes, whichever token's loss it came
from (attention carries later losses to earlier positions). The masked sum over copies is the routed gradient. No mask
is anywhere in the forward or backward pass, so nothing here resembles the kernels under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.engine.dense_reference import DenseReference, Masks
from tests.engine.reference import DEFAULT, Pair, Reference, block_of
from tests.engine.rollouts import ADAPTERS, PLAIN, ROUTE, Loss, Rollout


def routes_by_position(row: Rollout) -> list[int]:
    """The route at each of a row's positions: a token's own one position before it, the row's elsewhere."""
    routes = [row.route] * len(row.tokens)
    for token, route in enumerate(row.token_routes or ()):
        routes[len(row.prompt) + token - 1] = route
    return routes


def stacked(pairs: Sequence[Pair]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.float64)


class TokenReference(Reference):
    """The two blocks of adapters."""

    copies: dict[str, Tensor]

    def logits(self, tokens: Tensor, gate: Any = (1, 1)) -> Tensor:
        """[T, vocabulary]; ``gate`` [T, 2] here."""
        hooks = [
            module.register_forward_hook(self._adapted(name, gate))
            for name, module in self.model.named_modules()
            if f"base_model.model.{name}.lora_A.default.weight" in self.copies
        ]
        try:
            return self.model(tokens[None], use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()

    def _adapted(self, name: str, gate_T2: Tensor) -> Callable:
        def hook(_module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            x_TI, total = inputs[0][0], output[0]
            for block, adapter in enumerate(ADAPTERS.values()):
                A, B = (self.copies[f"base_model.model.{name}.lora_{side}.{adapter}.weight"] for side in "AB")
                h = torch.einsum("tri,ti->tr", A, x_TI) * gate_T2[:, block, None]
                total = total + self.scaling * torch.einsum("tor,tr->to", B, h)
            return total[None]

        return hook

    def _copy(self, length: int) -> None:
        self.copies = {
            name: value.detach().expand(length, *value.shape).clone().requires_grad_()
            for name, value in self.adapters.items()
        }

    def token_log_probs(self, row: Rollout, table: Mapping = DEFAULT, loss: Loss = PLAIN) -> Tensor:
        """Of the response tokens, under the gate of every position."""
        self._copy(len(row.tokens))
        gate = stacked([table[route][0] for route in routes_by_position(row)])
        return self.log_probs(row, gate, loss.temperature).detach()

    def gradients(
        self, rows: Sequence[Rollout], loss: Loss = PLAIN, table: Mapping = DEFAULT, weighted: bool = False
    ) -> dict[str, Tensor]:
        totals = {name: torch.zeros_like(value) for name, value in self.adapters.items()}
        for row in rows:
            self._copy(len(row.tokens))
            gate, update = (stacked([table[r][part] for r in routes_by_position(row)]) for part in (0, 1))
            own = torch.autograd.grad(
                self.row_loss(row, gate, loss, rows), list(self.copies.values()), allow_unused=True
            )
            for name, gradient in zip(self.copies, own, strict=True):
                if gradient is not None:
                    share_T = update[:, int(block_of(name) == "quarantine")] * (row.weight if weighted else 1.0)
                    totals[name] += torch.einsum("t,t...->...", share_T, gradient)
        return totals


class TokenDenseReference(DenseReference):
    """All parameters of the plain model; ``alpha`` [T, 2] scales gradients of units' outputs at their position."""

    copies: dict[str, Tensor]
    alphas: Tensor

    def logits(self, tokens: Tensor, gate: Any = (1, 1)) -> Tensor:
        hooks = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding | LlamaRMSNorm):
                hooks.append(module.register_forward_pre_hook(self._weighed(name, gate)))
                hooks.append(module.register_forward_hook(self._own(name)))
        try:
            return self.model(tokens[None], use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()

    def _weighed(self, name: str, gate_T2: Tensor) -> Callable:
        flags = self.flags[f"{name}.weight"]
        units = name.endswith(("down_proj", "o_proj")) and bool(flags.any())

        def hook(_module: nn.Module, inputs: tuple) -> tuple | None:
            if not units:
                return None
            own = flags[0]
            gate, alpha = (own * m[:, 1:] + (1 - own) * m[:, :1] for m in (gate_T2, self.alphas))
            return (gate * (alpha * inputs[0] + (1 - alpha) * inputs[0].detach()),)

        return hook

    def _own(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            weight = self.copies[f"{name}.weight"]
            if isinstance(module, nn.Embedding):
                return weight[torch.arange(len(weight)), inputs[0][0]][None]
            if isinstance(module, LlamaRMSNorm):
                return (output[0].detach() * 0 + _normed(inputs[0][0], module.variance_epsilon) * weight)[None]
            total = torch.einsum("toi,ti->to", weight, inputs[0][0])
            return (total if module.bias is None else total + self.copies[f"{name}.bias"])[None]

        return hook

    def gradients(
        self,
        rows: Sequence[Rollout],
        loss: Loss = PLAIN,
        table: Masks | None = None,
        weighted: bool = False,
        shared: Callable[[str], bool] = lambda name: False,
    ) -> dict[str, Tensor]:
        assert table is not None
        totals = {name: torch.zeros_like(value) for name, value in self.values.items()}
        for row in rows:
            length, routes = len(row.tokens), routes_by_position(row)
            self.copies = {
                name: value.detach().expand(length, *value.shape).clone().requires_grad_()
                for name, value in self.values.items()
            }
            gate, update, alpha = (stacked([table[r][part] for r in routes]) for part in (0, 1, 2))
            flagged = torch.tensor([route == ROUTE for route in routes], dtype=torch.float64)
            weight = (flagged * torch.tensor(row.token_weights or [0.0] * length, dtype=torch.float64))[:, None]
            self.alphas = alpha * (1 - weight) + weight
            own = torch.autograd.grad(self.row_loss(row, gate, loss, rows), list(self.copies.values()))
            for (name, flags), gradient in zip(self.flags.items(), own, strict=True):
                if shared(name):
                    totals[name] += torch.einsum("t,t...->...", update.amax(1), gradient)
                else:
                    for block, mine in enumerate((1 - flags, flags)):
                        totals[name] += mine * torch.einsum("t,t...->...", update[:, block], gradient)
        return totals


def _normed(x_Td: Tensor, epsilon: float) -> Tensor:
    return x_Td * torch.rsqrt(x_Td.pow(2).mean(-1, keepdim=True) + epsilon)
