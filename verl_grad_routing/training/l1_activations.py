"""L1 on the quarantine's bottleneck: few of its directions act on a token, so that what it learns stays in one place.

Shapes: T tokens (any leading dimensions), I input size of a layer, r rank of the quarantine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu

from verl_grad_routing.directions.checks import require_number
from verl_grad_routing.routing.blocks import QUARANTINE_ADAPTER
from verl_grad_routing.routing.install import RoutedLoraLinear, RoutingContext
from verl_grad_routing.training.hooks import ENGINE_HOOKS, Blocks, EngineHook


@ENGINE_HOOKS.register("l1_activations")
class L1Activations(EngineHook):
    """Adds ``weight · 1/N Σ_t Σ_layers |A_q x_t|₁`` to the loss, N the tokens of the global mini-batch that count.

    On MNIST routing needs such a term (arXiv 2410.04332: with an L1 and a correlation term the decoder's errors on the
    two groups of digits are .32 and .08, without them .32 and .32), and the Expand-Route-Ablate runs there carry
    ``1e-4 Σ|a| / (B T)`` on the activations of the new units. Here the units
    are the quarantine's bottleneck ``h = A_q x`` as its forward gate lets it act (0 on KEEP rollouts), at the
    positions that predict the tokens of the loss mask; summed over ranks and layers, averaged over tokens.

    It is part of the loss: its gradient obeys the update masks in A_q and reaches earlier layers through x, unmasked as
    the loss's own does. Its size does not depend on micro-batches, packing or ranks.

    The gradient joins the layer's own backward instead of travelling through the loss, because sharded weights are
    there in a layer's forward and backward only. Costs one product with A_q in the forward pass, two in the backward.
    """

    @dataclass(frozen=True)
    class Config:
        weight: float = 1e-4  # of the term; 0 is off. Cloud et al., ERA: 1e-4

        def __post_init__(self) -> None:
            require_number("weight", self.weight, 0)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._mask: Tensor | None = None  # [..., T, 1]; None: not listening
        self._coefficient = 0.0
        self._counts = False
        self._sum: Tensor | float = 0.0
        self._tokens = 0

    def attach(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, RoutedLoraLinear) and self.config.weight > 0:
                module.register_forward_hook(self._on_layer)

    def begin(
        self, micro_batch: Any, beside: Callable[[Sequence[Tensor]], Tensor] | None, *, again: bool = False
    ) -> None:
        self._mask = None
        if beside is None or self.config.weight == 0:
            return
        number = partial(tu.get_non_tensor_data, micro_batch, default=None)
        self._tokens, self._counts = int(number("batch_num_tokens")), not again
        # Gradients are averaged over all ranks, each of which holds its own rows or its own part of a sequence.
        shares = number("dp_size") * (number("sp_size") or 1)
        self._coefficient = self.config.weight * shares / max(self._tokens, 1)
        lengths = micro_batch["input_ids"].offsets().diff().tolist()
        rows = [
            predicting(mask, length) for mask, length in zip(micro_batch["loss_mask"].unbind(), lengths, strict=True)
        ]
        self._mask = beside([torch.stack((torch.zeros_like(row), row), dim=1) for row in rows])[..., 1:]

    def extra_loss(self, engine: Any, model_output: Mapping[str, Any], micro_batch: Any) -> None:
        self._counts = False  # the forward pass is over; checkpointing repeats it within the backward pass
        return None

    def transform_gradients(self, blocks: Blocks, recompute: Callable[[], None]) -> None:
        """Only reports: ``per_token`` is the term without its weight, ``loss`` with it."""
        total = torch.as_tensor(self._sum, dtype=torch.float64)
        self._sum = 0.0
        if dist.is_initialized():
            total = total.to(next(p.device for block in blocks.values() for p in block)).clone()
            dist.all_reduce(total)
        per_token = float(total) / max(self._tokens, 1)
        self.metrics = {"per_token": per_token, "loss": self.config.weight * per_token}

    def _on_layer(self, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        assert isinstance(layer, RoutedLoraLinear)
        context = layer.routing_context
        if self._mask is None or not torch.is_grad_enabled() or layer.disable_adapters or context is None:
            return None
        if context.ablated:
            return None
        output, value = penalised(
            output, given[0], layer.reads(QUARANTINE_ADAPTER), self._mask, context, self._coefficient
        )
        if self._counts:
            self._sum = self._sum + value
        return output


def predicting(mask_R: Tensor, length: int) -> Tensor:
    """A response's mask at the positions that predict its tokens, zero elsewhere: ``[length]``, float32."""
    before = length - mask_R.shape[0]
    weights = torch.zeros(length, device=mask_R.device)
    first = max(before - 1, 0)
    weights[first : length - 1] = mask_R[mask_R.shape[0] - (length - 1 - first) :].float()
    return weights


def penalised(
    output: Tensor, x: Tensor, A_q: Tensor, mask_T1: Tensor, context: RoutingContext, coefficient: float
) -> tuple[Tensor, Tensor]:
    """``output`` as it is, whose backward pass adds ``coefficient · Σ mask |h|``; and that sum without coefficient.

    Args:
        output: The layer's, ``[..., T, O]``.
        x: Its input, ``[..., T, I]``.
        A_q: ``[r, I]``.
        mask_T1: Which tokens count, broadcastable over the leading dimensions of x.
        context: The gate multiplies |h|, the update mask the gradient of A_q.
    """
    device = x.device.type
    low = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if low else x.dtype
    with torch.no_grad(), torch.autocast(device, enabled=False):
        h_Tr = x.to(dtype) @ A_q.to(dtype).t()
        weight_T1 = mask_T1 if context.forward_gate is None else mask_T1 * context.forward_gate[..., 1:]
        exact = torch.float64 if h_Tr.dtype == torch.float64 else torch.float32
        weight_T1 = weight_T1.to(exact)
        value = (h_Tr.to(exact).abs() * weight_T1).sum().double()
        slope_Tr = (h_Tr.sign().to(exact) * weight_T1 * coefficient).to(dtype)
        update_T1 = None if context.update_mask is None else context.update_mask[..., 1:]
        own_Tr = slope_Tr if update_T1 is None else slope_Tr * update_T1.to(dtype)
    return _AddSlope.apply(output, x, A_q, slope_Tr, own_Tr), value


class _AddSlope(torch.autograd.Function):
    """The identity on ``output``; backward adds ``slope @ A`` to x's gradient and ``ownᵀ x`` to A's."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, A: Tensor, slope_Tr: Tensor, own_Tr: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, slope_Tr, own_Tr)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, slope_Tr, own_Tr = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            dx = (slope_Tr @ A.to(slope_Tr.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
            flat = own_Tr.flatten(0, -2)
            dA = flat.t() @ x.reshape(-1, x.shape[-1]).to(flat.dtype) if ctx.needs_input_grad[2] else None
        return g, dx, dA if dA is None else dA.to(A.dtype), None, None
