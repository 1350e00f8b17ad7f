"""Every rollout's own gradient of the probe, from one forward and backward pass over the whole batch.

With B = 0 a probe ``y = W x + (alpha / r) B A x`` leaves the model as it is, the gradient of A is zero, and for a loss
that is a *sum* over rollouts the gradient of B that rollout i brings is

    g_i = (alpha / r) sum over i's tokens of  delta_t (A x_t)ᵀ          [d_out, r]

with x the layer's input and delta the gradient of its output: both are there in any backward pass, and no rollout's
delta depends on another rollout. So no adapter is needed, and no parameter's gradient is computed on the way.

Legend: ``N`` tokens of a flattened batch, padding included, ``B`` rollouts, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from verl_grad_routing.errors import UserError

Span = tuple[int, int]
Consume = Callable[[str, Tensor, Tensor], None]


def packed_spans(lengths: Sequence[int]) -> list[Span]:
    """Where each rollout's tokens lie in a packed batch; tokens after the last one are filling."""
    ends = [sum(lengths[: row + 1]) for row in range(len(lengths))]
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def padded_spans(lengths: Sequence[int], width: int) -> list[Span]:
    """The same for rows of ``width`` tokens, padded on the right and laid end to end."""
    return [(row * width, row * width + length) for row, length in enumerate(lengths)]


def per_sample_gradients(x_NI: Tensor, delta_NO: Tensor, A_rI: Tensor, spans: Sequence[Span], scaling: float) -> Tensor:
    """Each rollout's gradient of the probe's B, ``[B, d_out, r]``, float32 (float64 for float64 inputs).

    Args:
        x_NI: Inputs of the linear layer.
        delta_NO: Gradients of the loss with respect to its outputs.
        A_rI: The probe's down-projection.
        spans: Tokens of each rollout.
        scaling: alpha / r.
    """
    dtype = torch.float64 if x_NI.dtype == torch.float64 else torch.float32
    A = A_rI.to(x_NI.device, dtype)
    gradients = []
    with torch.autocast(x_NI.device.type, enabled=False):
        for start, end in spans:
            h_Tr = x_NI[start:end].to(dtype) @ A.t()
            gradients.append(scaling * (delta_NO[start:end].to(dtype).t() @ h_Tr))
    return torch.stack(gradients)


class GradientTaps:
    """Hooks that hand each module's input and output gradient to a consumer; a context manager around both passes.

    ``backward`` asks autograd for the gradient of a number that only the taps depend on: it runs down to the
    earliest tapped module and no further, and leaves every parameter's ``.grad`` as it is. Activations are not kept
    beyond what autograd keeps, so activation checkpointing works, and what a module brings is consumed at once.

    Args:
        modules: Linear layers by name.
        consume: Called as ``consume(name, x [N, d_in], delta [N, d_out])`` in the backward pass, with the leading
            dimensions flattened.
    """

    def __init__(self, modules: Mapping[str, nn.Module], consume: Consume):
        self.modules, self.consume = modules, consume
        self.leaf: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> GradientTaps:
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.leaf = [], None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def tap(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            if self.leaf is None:
                self.leaf = torch.zeros((), device=output.device, requires_grad=True)
            return _Tap.apply(output, inputs[0], self.leaf, name, self.consume)  # type: ignore[no-any-return]

        return tap

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of ``loss``, a scalar that is a sum over rollouts."""
        if self.leaf is None:
            raise UserError("tapped modules", sorted(self.modules), "none of them ran in the forward pass")
        torch.autograd.grad(loss, [self.leaf])


class _Tap(torch.autograd.Function):
    """The identity on ``output``; its backward hands over input and gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, leaf: Tensor, name: str, consume: Consume) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.consume, ctx.zero = name, consume, leaf.detach()
        # Not a view for autograd: callers may change a layer's output in place.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.consume(ctx.name, x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1]))
        return delta, None, ctx.zero, None, None
