# ruff: noqa: F722  (jaxtyping dimension strings are no forward references)
"""Low-rank adapters of two blocks with per-token forward gates and exact per-token routed gradients.

With ``A = [A_deployed; A_quarantine]``, ``B = [B_deployed, B_quarantine]``, the per-token gate ``G`` and update mask
``U`` (both ``[T, 2]``, each column repeated over the ranks of its block), scaling ``s`` and output gradient ``g``::

    h  = (x Aᵀ) ⊙ G            y  = x Wᵀ + b + s · h Bᵀ
    gh = s · (g B) ⊙ G         dx = g W + gh A                never masked by U
    dB = s · gᵀ (h ⊙ U)        dA = (gh ⊙ U)ᵀ x               rows of masked tokens are zero

So each block's gradient is the sum of the gradients of exactly the tokens that may train it, whatever else is in the
batch, and the gradient that reaches earlier layers is the ordinary one. This is gradient routing on parameters (the
"parameter masking" of arXiv 2512.05648), not on activations: detaching an adapter's *output* cuts the path to earlier
layers too. It has to happen here, inside autograd: a data-parallel reduction mixes tokens before a ``.grad`` exists.

The up-projection accumulates into the base product (and ``gh A`` into ``g W``) inside the matrix multiplication, so
nothing but the products themselves passes over ``[T, d_out]``; masks act on ``[T, rank]`` only.

Legend: ``T`` tokens (any leading dimensions), ``R = r_deployed + r_quarantine``, ``2`` = (deployed, quarantine).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_grad_routing.errors import UserError


def routed_lora(
    x: Float[Tensor, "*T d_in"],
    lora_A: Float[Tensor, "R d_in"],
    lora_B: Float[Tensor, "d_out R"],
    forward_gate: Float[Tensor, "*#T 2"] | None,
    update_mask: Float[Tensor, "*#T 2"] | None,
    scaling: float,
    deployed_rank: int | None = None,
) -> Float[Tensor, "*T d_out"]:
    """The two blocks' contribution ``s · ((x Aᵀ) ⊙ G) Bᵀ``, without the base layer.

    Args:
        x: Input.
        lora_A: Down-projections, the deployed block's rows first.
        lora_B: Up-projections, the deployed block's columns first.
        forward_gate: Per-token gate of each block, broadcastable over the leading dimensions of ``x``; ``None`` is 1.
        update_mask: Per-token weight of each block's gradient, likewise.
        scaling: LoRA's alpha / rank.
        deployed_rank: Rank of the deployed block; half of ``R`` unless given.

    Raises:
        UserError: ``deployed_rank`` leaves one block empty, ``R`` is odd and no ``deployed_rank`` given, or a mask
            does not fit ``x``.
    """
    total = lora_A.shape[0]
    if deployed_rank is None:
        if total % 2:
            raise UserError("deployed_rank", None, f"a total rank of {total} has no half; give deployed_rank")
        deployed_rank = total // 2
    if not 0 < deployed_rank < total:
        raise UserError("deployed_rank", deployed_rank, f"give a rank between 1 and {total - 1}")
    masks = _rank_masks(x, forward_gate, update_mask, (deployed_rank, total - deployed_rank), None)
    a_blocks, b_blocks = lora_A.tensor_split([deployed_rank], 0), lora_B.tensor_split([deployed_rank], 1)
    return _RoutedLinear.apply(x, None, None, *a_blocks, *b_blocks, *masks, scaling)


def routed_linear(
    x: Float[Tensor, "*T d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    A_deployed: Float[Tensor, "r_d d_in"],
    A_quarantine: Float[Tensor, "r_q d_in"] | None,
    B_deployed: Float[Tensor, "d_out r_d"],
    B_quarantine: Float[Tensor, "d_out r_q"] | None,
    forward_gate: Float[Tensor, "*#T 2"] | None,
    update_mask: Float[Tensor, "*#T 2"] | None,
    scaling: float,
    of_ranks: tuple[Tensor | None, Tensor | None] | None = None,
) -> Float[Tensor, "*T d_out"]:
    """A frozen linear layer plus two routed low-rank blocks, fused.

    Under ``torch.autocast`` everything is computed in the autocast dtype, as in ``F.linear``; otherwise in the dtype
    of ``x``, to which adapters of another dtype are cast. Gradients have their parameter's dtype.

    Args:
        weight, bias: The base layer's, frozen.
        A_quarantine, B_quarantine: Both ``None`` for the deployed block alone; then no masks may be given.
        forward_gate, update_mask: As in :func:`routed_lora`.
        of_ranks: Both masks :func:`over_ranks`, which layers of the same ranks can share; made here unless given.

    Raises:
        UserError: The base layer wants a gradient, or a mask does not fit ``x``.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise UserError("base layer", "requires_grad=True", "freeze its weight and bias; only adapters are routed")
    if (A_quarantine is None) != (B_quarantine is None):
        raise UserError("quarantine", None, "give both of A_quarantine and B_quarantine, or neither")
    if A_quarantine is None and (forward_gate is not None or update_mask is not None):
        raise UserError("forward_gate/update_mask", "given", "masks need both blocks; pass None for a single block")
    ranks = (A_deployed.shape[0], 0 if A_quarantine is None else A_quarantine.shape[0])
    masks = _rank_masks(x, forward_gate, update_mask, ranks, of_ranks)
    return _RoutedLinear.apply(x, weight, bias, A_deployed, A_quarantine, B_deployed, B_quarantine, *masks, scaling)


def over_ranks(
    mask: Float[Tensor, "*T 2"], deployed_rank: int, quarantine_rank: int, name: str = "mask"
) -> Float[Tensor, "*T R"]:
    """A mask of blocks repeated over their ranks, the deployed block's first: a factor for ``[..., T, R]`` as it is.

    Raises:
        UserError: The last dimension of the mask, which the message calls ``name``, is not 2.
    """
    if mask.ndim == 0 or mask.shape[-1] != 2:
        raise UserError(name, tuple(mask.shape), "give [..., T, 2], a column for each block")
    columns = zip(mask.split(1, dim=-1), (deployed_rank, quarantine_rank), strict=True)
    return torch.cat([column.expand(*mask.shape[:-1], rank) for column, rank in columns], dim=-1)


def _rank_masks(
    x: Tensor,
    gate: Tensor | None,
    update: Tensor | None,
    ranks: tuple[int, int],
    of_ranks: tuple[Tensor | None, Tensor | None] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Both masks over ranks, as ``[T, R]``."""
    gate_T2, update_T2 = _flat_mask("forward_gate", gate, x), _flat_mask("update_mask", update, x)
    if of_ranks is None:
        return tuple(None if mask is None else over_ranks(mask, *ranks) for mask in (gate_T2, update_T2))  # type: ignore[return-value]
    total = sum(ranks)
    for mask, repeated in zip((gate, update), of_ranks, strict=True):
        shape = None if repeated is None else tuple(repeated.shape)
        if shape != (None if mask is None else (*mask.shape[:-1], total)):
            raise UserError("of_ranks", shape, f"give the masks themselves over ranks {ranks}")
    shape = (*x.shape[:-1], total)
    return tuple(None if mask is None else mask.expand(shape).reshape(-1, total) for mask in of_ranks)  # type: ignore[return-value]


def _flat_mask(name: str, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """``mask`` broadcast to the leading dimensions of ``x`` and flattened to ``[T, 2]``."""
    if mask is None:
        return None
    if mask.requires_grad:
        raise UserError(name, "requires_grad=True", "masks are decisions, not parameters; detach them")
    shape = (*x.shape[:-1], 2)
    if mask.shape != shape:
        wrong = mask.ndim > len(shape) or mask.ndim == 0 or mask.shape[-1] != 2
        if wrong or any(m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False)):
            fix = f"must broadcast to {shape}; set the masks of this batch, or clear() those of the last one"
            raise UserError(name, tuple(mask.shape), fix)
        mask = mask.expand(shape)
    return mask.reshape(-1, 2)


def _join(first: Tensor, second: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    return (first if second is None else torch.cat((first, second), dim)).to(dtype)


def _scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``scaling · left @ right``, scaled inside the product."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scaling)


def _masked(values_TR: Tensor, mask_TR: Tensor | None, inplace: bool = False) -> Tensor:
    """``values ⊙ mask`` in the dtype of ``values``."""
    if mask_TR is None:
        return values_TR
    return torch.mul(values_TR, mask_TR, out=values_TR if inplace else torch.empty_like(values_TR))


class _RoutedLinear(torch.autograd.Function):
    """The equations of the module docstring; masks arrive as ``[T, R]``, the base layer may be ``None``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A_d: Tensor,
        A_q: Tensor | None,
        B_d: Tensor,
        B_q: Tensor | None,
        gate: Tensor | None,
        update: Tensor | None,
        scaling: float,
    ) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        A, B = _join(A_d, A_q, 0, dtype), _join(B_d, B_q, 1, dtype)
        h_TR = _masked(x_TI @ A.t(), gate, inplace=True)
        if weight is None:
            y_TO = _scaled_product(h_TR, B.t(), scaling)
        else:
            if autocast:
                weight_low, bias_low = weight.to(dtype), None if bias is None else bias.to(dtype)
            else:
                weight_low, bias_low = weight, bias
            y_TO = F.linear(x_TI, weight_low, bias_low).addmm_(h_TR, B.t(), alpha=scaling)
        need_A, need_B = any(ctx.needs_input_grad[3:5]), any(ctx.needs_input_grad[5:7])
        # The parameters themselves are saved, never their joined or cast copies: sharded training frees and refills
        # their storage between forward and backward, and copies would outlive it.
        ctx.save_for_backward(
            x_TI if need_A else None, weight, A_d, A_q, B_d, B_q, h_TR if need_B else None, gate, update
        )
        ctx.scaling, ctx.dtype, ctx.x_shape = scaling, dtype, x.shape
        # Not a view of y_TO for autograd: callers may change the output in place, as they may F.linear's.
        return torch.ops.aten._unsafe_view(y_TO, (*x.shape[:-1], y_TO.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(g.device.type):  # every dtype is explicit here, wherever backward() is called
            with torch.autocast(g.device.type, enabled=False):
                return _RoutedLinear._gradients(ctx, g)
        return _RoutedLinear._gradients(ctx, g)

    @staticmethod
    def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight, A_d, A_q, B_d, B_q, h_TR, gate, update = ctx.saved_tensors
        dtype, rank = ctx.dtype, A_d.shape[0]
        need_x, need_A, need_B = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:5]), any(ctx.needs_input_grad[5:7])
        g_TO = g.reshape(-1, g.shape[-1]).to(dtype)
        dx = dA = dB = None
        if need_x or need_A:
            gh_TR = _scaled_product(g_TO, _join(B_d, B_q, 1, dtype), ctx.scaling)
            gh_TR = _masked(gh_TR, gate, inplace=True)
            if need_x:
                A = _join(A_d, A_q, 0, dtype)
                dx = gh_TR @ A if weight is None else (g_TO @ weight.to(dtype)).addmm_(gh_TR, A)
                dx = dx.view(ctx.x_shape)
            if need_A:
                dA = _masked(gh_TR, update, inplace=True).t() @ x_TI
        if need_B:
            dB = _scaled_product(_masked(h_TR, update).t(), g_TO, ctx.scaling).t()
        dA_d, dA_q = _split(dA, rank, 0, A_q is not None)
        dB_d, dB_q = _split(dB, rank, 1, B_q is not None)
        return dx, None, None, dA_d, dA_q, dB_d, dB_q, None, None, None


def _split(joined: Tensor | None, rank: int, dim: int, two: bool) -> tuple[Tensor | None, Tensor | None]:
    """The blocks' own gradients, contiguous; autograd casts them to their parameters' dtypes."""
    if joined is None:
        return None, None
    deployed = joined.narrow(dim, 0, rank).contiguous()
    return deployed, joined.narrow(dim, rank, joined.shape[dim] - rank).contiguous() if two else None
