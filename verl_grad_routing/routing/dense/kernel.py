"""Exact per-token masks on the gradients of ordinary weights: linear layers, embeddings, norms.

A linear layer is ``y = h Wᵀ + b``. Where the quarantine lies along its output (gate, up, q, k, v) the rows of W are the
units, where it lies along its input (down, o) the columns are. With update masks ``U``, forward gates ``G`` and
activation-gradient weights ``A``, each ``[T, 2]`` for (deployed, quarantine) and read by the unit that a row or column
belongs to::

    rows       y = x Wᵀ + b            dW = (g ⊙ U)ᵀ x       db = Σ_t g ⊙ U      dx = g W
    columns    h = x ⊙ G               dW = gᵀ (h ⊙ U)       db = Σ_t g u_d      dx = (g W) ⊙ G ⊙ A
               y = h Wᵀ + b

``dx`` is never masked by ``U``: SGTM zeroes gradients of parameters after the full backward pass (arXiv 2512.05648 §3).
``A`` is Cloud's mask on activations, real-valued and also negative (arXiv 2410.04332 eq. 1; ``α·act + (1-α)·sg(act)``
in their code); with weights of units ``w`` it is ``A + (1 - A) w``, of every token and unit. The gate and A sit on unit
outputs, the inputs of the columns' layers. That is the same as on pre-activations, where SGTM's code has them: a unit
that is switched off gives zero either way (``act(0) = 0``), and an activation function is elementwise, so a factor on
its output's gradient is one on its input's.

Masks of zeros and ones, all there are without weights, say which tokens train a block: the deployed block's part of
``dW`` is then a product over these tokens alone (:class:`TokenSets`), and a rollout that does not train it costs it
nothing. Where ``U`` is 0 wherever ``G`` is not 1, ``h ⊙ U`` is ``x ⊙ U``: the layer then keeps ``x`` for the backward
pass, as ``F.linear`` does, and not ``h`` beside it. All shipped tables are so, for parameters that are not shared.

Legend: ``T`` tokens, ``I``/``O`` input/output features, ``D``/``Q`` tokens that train the deployed block / quarantine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.dense.units import Range
from verl_grad_routing.routing.kernel import _flat_mask as flat_mask

Side = Literal["rows", "columns", "none"]
FEW = 4  # runs of a block's units up to which each has a product of its own


@dataclass(frozen=True)
class TokenSets:
    """An update mask of zeros and ones as the tokens that train the deployed block and the quarantine.

    Attributes:
        deployed: int64, positions in the flattened mask; ``None``: all of them.
        quarantine_T1: ``[T, 1]``, the mask's second column; ``None`` where both blocks learn from the same tokens.
    """

    deployed: Tensor | None
    quarantine_T1: Tensor | None

    @classmethod
    def of(cls, mask: Tensor | None) -> TokenSets | None:
        """Of a mask ``[..., T, 2]``; ``None`` without one, and where some token trains a block by part."""
        if mask is None or not ((mask == 0) | (mask == 1)).all():
            return None
        deployed_T, quarantine_T = mask.reshape(-1, 2).unbind(1)
        alike = torch.equal(deployed_T, quarantine_T)
        return cls(_chosen(deployed_T), None if alike else quarantine_T[:, None])


def _chosen(mask_T: Tensor) -> Tensor | None:
    index = mask_T.nonzero().flatten()
    return None if len(index) == len(mask_T) else index


def unit_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    side: Side = "none",
    ranges: Sequence[Range] = (),
    update_mask: Tensor | None = None,
    token_sets: TokenSets | None = None,
    bias_mask: Tensor | None = None,
    forward_gate: Tensor | None = None,
    gates_quarantine_alone: bool = False,
    updates_within_gate: bool = False,
    activation_gradient: Tensor | None = None,
    unit_weights: Tensor | None = None,
) -> Tensor:
    """A linear layer whose units are of two blocks; with every mask ``None`` it is ``F.linear``.

    Args:
        x: ``[..., T, I]``.
        weight: ``[O, I]``.
        bias: ``[O]``.
        side: Whether units are ``rows`` or ``columns`` of the weight; ``none``: all of it is of the first block.
        ranges: The quarantine's rows or columns.
        update_mask: ``[..., T, 2]``, how much each token trains (deployed, quarantine) parts of the weight.
        token_sets: ``TokenSets.of(update_mask)``, which all layers of a pass share; ``None`` multiplies by the mask.
        bias_mask: The same for the bias, whose units are the rows'; other biases take the first column.
        forward_gate: ``[..., T, 2]``, which units' outputs are there; ``columns`` only.
        gates_quarantine_alone: The gate's first column is 1 everywhere: only the quarantine's units are touched.
        updates_within_gate: The update mask is 0 wherever the gate is not 1 (:func:`updates_within`).
        activation_gradient: ``[..., T, 2]``, factors on the gradient of units' outputs; ``columns`` only.
        unit_weights: ``[I]``, how much each unit is taken out of these factors.

    Returns:
        ``[..., T, O]``.

    Raises:
        UserError: A mask does not fit ``x``, or one that acts on units' outputs is given elsewhere.
    """
    if side != "columns" and (forward_gate is not None or activation_gradient is not None):
        raise UserError("forward_gate/activation_gradient", side, "units' outputs are the columns' inputs; pass None")
    if update_mask is bias_mask is forward_gate is activation_gradient is None:
        return F.linear(x, weight, bias)
    masks = {"update_mask": update_mask, "bias_mask": bias_mask, "forward_gate": forward_gate}
    masks["activation_gradient"] = activation_gradient
    flat = [flat_mask(name, mask, x) for name, mask in masks.items()]
    whole = update_mask is not None and update_mask.shape[:-1] == x.shape[:-1]  # positions are those of x
    sets = token_sets if whole else None
    gating = (gates_quarantine_alone, updates_within_gate)
    runs = tuple((first, last) for first, last in ranges)
    return _UnitLinear.apply(x, weight, bias, *flat, *gating, sets, unit_weights, side, runs)


def updates_within(gate: Tensor | None, update_mask: Tensor | None) -> bool:
    """Whether ``update_mask`` is 0 wherever ``gate`` is not 1, both ``[..., T, 2]``, ``None`` being 1 everywhere."""
    if gate is None:
        return True
    return update_mask is not None and gate.shape == update_mask.shape and not (update_mask[gate != 1] != 0).any()


@cache
def _others(ranges: tuple[Range, ...], count: int) -> tuple[Range, ...]:
    """What sorted ``ranges`` leave of ``(0, count)``."""
    edges = [0, *(edge for run in ranges for edge in run), count]
    return tuple((first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if last > first)


def _by_unit(
    values_TN: Tensor,
    mask_T2: Tensor | None,
    ranges: tuple[Range, ...],
    out: Tensor | None = None,
    quarantine_alone: bool = False,
) -> Tensor:
    """``values ⊙ mask``: the mask's second column over ``ranges``, its first elsewhere.

    ``out`` is ``values`` or a new tensor. ``quarantine_alone`` takes the first column as ones: its units stay.
    """
    if mask_T2 is None:
        return values_TN
    mask_T2 = mask_T2.to(values_TN.dtype)
    if quarantine_alone:
        out = values_TN.clone() if out is None else out
        for first, last in ranges:
            out[:, first:last].mul_(mask_T2[:, 1, None])
        return out
    out = torch.empty_like(values_TN) if out is None else out
    for column, runs in enumerate((_others(ranges, values_TN.shape[1]), ranges)):
        for first, last in runs:
            torch.mul(values_TN[:, first:last], mask_T2[:, column, None], out=out[:, first:last])
    return out


def _weight_gradient(g_TO: Tensor, h_TI: Tensor, mask_T2: Tensor, side: Side, ranges: tuple[Range, ...]) -> Tensor:
    """``Σ_t u_t g_t h_tᵀ`` in the fewest passes over tokens.

    The masks go onto the side that carries the units, each unit's own, unless the other is so much narrower that it
    takes less to mask it once a block; each block's rows or columns are then a product of their own.
    """
    columns = side == "columns"
    units, other = (h_TI, g_TO) if columns else (g_TO, h_TI)
    if units.shape[1] <= (1 + bool(ranges)) * other.shape[1]:
        masked = _by_unit(units, mask_T2, ranges)
        return g_TO.t() @ masked if columns else masked.t() @ h_TI
    gradient = g_TO.new_empty(g_TO.shape[1], h_TI.shape[1])
    for column, runs in enumerate((_others(ranges, units.shape[1]), ranges)):
        masked = other * mask_T2[:, column, None].to(other.dtype) if runs else other
        for first, last in runs:
            _product(units[:, first:last], masked, gradient, columns, first, last)
    return gradient


def _set_gradient(g_TO: Tensor, h_TI: Tensor, sets: TokenSets, side: Side, ranges: tuple[Range, ...]) -> Tensor:
    """The same for masks of zeros and ones: ``Σ_D g hᵀ``, and the quarantine's rows or columns of ``Σ_Q g hᵀ``.

    Blocks of few runs of units are a product each. Of scattered units the first product has the quarantine's part too,
    which is written over: that takes less than one for each run between them. The quarantine is narrow, so in its own
    product the mask on its units takes less than picking its tokens out of both sides.
    """
    if not ranges or sets.quarantine_T1 is None:
        return _at(g_TO, sets.deployed).t() @ _at(h_TI, sets.deployed)
    columns = side == "columns"
    units, other = (h_TI, g_TO) if columns else (g_TO, h_TI)
    gradient = g_TO.new_empty(g_TO.shape[1], h_TI.shape[1])
    few = len(ranges) <= FEW
    other_D = _at(other, sets.deployed)
    for first, last in _others(ranges, units.shape[1]) if few else ((0, units.shape[1]),):
        _product(_at(units[:, first:last], sets.deployed), other_D, gradient, columns, first, last)
    quarantine_T1 = sets.quarantine_T1.to(units.dtype)
    if few:
        for first, last in ranges:
            _product(units[:, first:last] * quarantine_T1, other, gradient, columns, first, last)
        return gradient
    masked = torch.cat([units[:, first:last] for first, last in ranges], dim=1) * quarantine_T1
    theirs = gradient.t() if columns else gradient
    product = masked.t() @ other
    for (first, last), part in zip(ranges, product.split([last - first for first, last in ranges]), strict=True):
        theirs[first:last] = part
    return gradient


def _product(units: Tensor, other: Tensor, gradient: Tensor, columns: bool, first: int, last: int) -> None:
    """Write the rows or columns ``[first, last)`` of a weight's gradient."""
    if columns:
        torch.mm(other.t(), units, out=gradient[:, first:last])
    else:
        torch.mm(units.t(), other, out=gradient[first:last])


def _at(values_TN: Tensor, index: Tensor | None) -> Tensor:
    return values_TN if index is None else values_TN.index_select(0, index)


class _UnitLinear(torch.autograd.Function):
    """The equations of the module docstring; masks arrive as ``[T, 2]``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        update: Tensor | None,
        bias_update: Tensor | None,
        gate: Tensor | None,
        activation: Tensor | None,
        quarantine_alone: bool,
        within_gate: bool,
        sets: TokenSets | None,
        unit_weights: Tensor | None,
        side: Side,
        ranges: tuple[Range, ...],
    ) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        low = x.to(dtype)
        h = low if gate is None else _by_unit(low.reshape(-1, x.shape[-1]), gate, ranges, None, quarantine_alone)
        low_bias = bias.to(dtype) if autocast and bias is not None else bias
        y = F.linear(h, weight.to(dtype) if autocast else weight, low_bias)
        # The weight itself is saved, never a cast copy: sharded training frees and refills its storage.
        kept = low if within_gate and update is not None else h
        ctx.save_for_backward(kept if ctx.needs_input_grad[1] else None, weight, update, bias_update, gate, activation)
        ctx.sets, ctx.side, ctx.ranges, ctx.dtype, ctx.x_shape = sets, side, ranges, dtype, x.shape
        ctx.quarantine_alone, ctx.unit_weights = quarantine_alone, unit_weights
        # Of x's shape, and no view for autograd, as F.linear's own result can be: callers may change it in place.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(g.device.type):  # every dtype is explicit here
            with torch.autocast(g.device.type, enabled=False):
                return _UnitLinear._gradients(ctx, g)
        return _UnitLinear._gradients(ctx, g)

    @staticmethod
    def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, update, bias_update, gate, activation = ctx.saved_tensors
        g_TO = g.reshape(-1, g.shape[-1]).to(ctx.dtype)
        dx = dW = db = None
        if ctx.needs_input_grad[0]:
            dx_TI = g_TO @ weight.to(ctx.dtype)
            if activation is not None and ctx.unit_weights is not None:
                w_I = ctx.unit_weights.to(dx_TI)
                dx_TI = torch.lerp(_by_unit(dx_TI, activation, ctx.ranges), dx_TI, w_I.expand_as(dx_TI))
                activation = None
            factor = activation if gate is None else gate if activation is None else gate * activation
            alone = ctx.quarantine_alone and activation is None
            dx = _by_unit(dx_TI, factor, ctx.ranges, dx_TI, alone).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            h_TI = h.reshape(-1, h.shape[-1])
            if update is None:
                dW = g_TO.t() @ h_TI
            elif ctx.sets is None:
                dW = _weight_gradient(g_TO, h_TI, update, ctx.side, ctx.ranges)
            else:
                dW = _set_gradient(g_TO, h_TI, ctx.sets, ctx.side, ctx.ranges)
        if ctx.needs_input_grad[2]:
            db = _bias_gradient(g_TO, bias_update, ctx.ranges if ctx.side == "rows" else ())
        return dx, dW, db, *(None,) * 10


def _bias_gradient(g_TO: Tensor, mask_T2: Tensor | None, ranges: tuple[Range, ...]) -> Tensor:
    if mask_T2 is None:
        return g_TO.sum(0)
    both_2O = mask_T2.to(g_TO.dtype).t() @ g_TO
    gradient = both_2O[0]
    for first, last in ranges:
        gradient[first:last] = both_2O[1, first:last]
    return gradient


class _TokenWeight(torch.autograd.Function):
    """A weight ``[d]`` seen once a token, as ``[..., T, d]`` without memory; its gradient is masked token by token."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask_T: Tensor, middle: int) -> Tensor:
        ctx.save_for_backward(mask_T)
        return weight.expand(*mask_T.shape, *(1,) * middle, weight.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (mask_T,) = ctx.saved_tensors
        return mask_T.reshape(-1).to(g.dtype) @ g.reshape(-1, g.shape[-1]), None, None


def token_weight(weight: Tensor, mask_T: Tensor, dims: int) -> Tensor:
    """``weight`` [d] for an elementwise product with ``x [*mask_T.shape, ..., d]`` of ``dims`` dimensions.

    The product's value is unchanged; each token's share of the weight's gradient is multiplied by its mask.
    """
    return _TokenWeight.apply(weight, mask_T, dims - mask_T.ndim - 1)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, mask_T: Tensor) -> Tensor:
        ctx.save_for_backward(mask_T)
        return torch.ops.aten._unsafe_view(y, y.shape)  # not a view for autograd: FSDP2 hooks a module's output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (mask_T,) = ctx.saved_tensors
        return g * mask_T.unsqueeze(-1).to(g.dtype), None


def scaled_gradient(y: Tensor, mask_T: Tensor) -> Tensor:
    """``y [..., T, d]`` itself; its gradient is multiplied by the token's mask ``[..., T]``, broadcast."""
    return _ScaledGradient.apply(y, mask_T)
