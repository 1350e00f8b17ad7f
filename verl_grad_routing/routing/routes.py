# ruff: noqa: F722  (jaxtyping dimension strings are no forward references)
"""Routes, and the two masks each of them stands for.

A gate gives every rollout of a batch one route. A :class:`RoutingTable` translates a route into a *forward gate*
(is the block there at all?) and an *update mask* (do this rollout's tokens train the block?), each a pair of numbers
for the (deployed, quarantine) blocks. The training engine executes those masks and knows no method's name.

Legend: ``B`` rollouts, ``S`` padded length, ``T`` packed tokens, ``2`` = (deployed, quarantine).

Sources: the deployed/quarantine split and "forward normal, update masked" is gradient routing, arXiv 2410.04332 eq. 1;
the three kinds of rollout (clean, unlabelled, flagged) follow SGTM, arXiv 2512.05648 §3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from verl_grad_routing.errors import UserError


class Route(IntEnum):
    """What a rollout may teach."""

    KEEP = 0
    """Trusted clean: the quarantine is absent, the deployed block learns."""
    ABSORB = 1
    """Unflagged, the default: both blocks act and learn; what resembles the quarantine is absorbed there."""
    ROUTE = 2
    """Flagged: both blocks act, only the quarantine learns."""


@dataclass(frozen=True)
class RouteMasks:
    """Forward gate and update mask of one route, each (deployed, quarantine) with values in [0, 1].

    ``activation_gradient`` holds factors on the gradient of the blocks' unit outputs, any number up to 1, negative ones
    too: Cloud's alpha (arXiv 2410.04332 eq. 1). Blocks of dedicated units have such outputs, adapters have none.

    Raises:
        UserError: A value outside [0, 1], not a pair, or an update of a block that the gate switches off (its gradient
            is zero, so the block would have mass without a signal and Adam's momentum alone would move it).
    """

    forward_gate: tuple[float, float]
    update_mask: tuple[float, float]
    activation_gradient: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        alphas = tuple(float(value) for value in self.activation_gradient)
        if len(alphas) != 2 or not all(math.isfinite(value) and value <= 1.0 for value in alphas):
            raise UserError("activation_gradient", alphas, "give two numbers of at most 1: (deployed, quarantine)")
        object.__setattr__(self, "activation_gradient", alphas)
        for name in ("forward_gate", "update_mask"):
            pair = tuple(float(value) for value in getattr(self, name))
            if len(pair) != 2 or not all(0.0 <= value <= 1.0 for value in pair):
                raise UserError(name, pair, "give two numbers in [0, 1]: (deployed, quarantine)")
            object.__setattr__(self, name, pair)
        if any(gate == 0.0 and update > 0.0 for gate, update in zip(self.forward_gate, self.update_mask, strict=True)):
            raise UserError("update_mask", self.update_mask, "a block whose forward gate is 0 cannot learn; set 0")


@dataclass(frozen=True)
class RoutingTable:
    """The masks of every route. Derive others with :func:`dataclasses.replace`."""

    keep: RouteMasks = RouteMasks(forward_gate=(1, 0), update_mask=(1, 0))
    absorb: RouteMasks = RouteMasks(forward_gate=(1, 1), update_mask=(1, 1))
    route: RouteMasks = RouteMasks(forward_gate=(1, 1), update_mask=(0, 1))

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), RouteMasks):
                raise UserError(field.name, getattr(self, field.name), "give RouteMasks(forward_gate, update_mask)")

    def masks(self, route: int) -> RouteMasks:
        """Masks of one route, e.g. ``table.masks(Route.ROUTE)``."""
        return (self.keep, self.absorb, self.route)[Route(route)]

    def without_quarantine(self) -> RoutingTable:
        """The same updates of the deployed block where the quarantine is absent: its gate and its update are 0."""

        def absent(masks: RouteMasks) -> RouteMasks:
            return RouteMasks(forward_gate=(1, 0), update_mask=(masks.update_mask[0], 0))

        return RoutingTable(*(absent(self.masks(route)) for route in Route))

    def as_tensors(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """(forward gate, update mask), each float32 ``[3, 2]``, indexed by route."""
        rows = [self.masks(route) for route in Route]
        gate_32 = torch.tensor([row.forward_gate for row in rows], dtype=torch.float32, device=device)
        update_32 = torch.tensor([row.update_mask for row in rows], dtype=torch.float32, device=device)
        return gate_32, update_32

    @property
    def weighs_activations(self) -> bool:
        """Whether some route's activation gradients are not as they are."""
        return any(self.masks(route).activation_gradient != (1.0, 1.0) for route in Route)


DEFAULT = RoutingTable()
"""Absorption: unflagged rollouts train both blocks, flagged ones the quarantine only."""

STRICT = RoutingTable(absorb=RouteMasks(forward_gate=(1, 1), update_mask=(1, 0)))
"""Strict quarantine: it learns from flagged rollouts only."""

ACTIVATION_MASKING = RoutingTable(route=RouteMasks(forward_gate=(0, 1), update_mask=(0, 1)))
"""Activation masking of arXiv 2512.05648: on flagged rollouts the deployed block is absent as well as untrained."""


def _as_routes(routes_B: Tensor | Sequence[int]) -> Tensor:
    routes = torch.as_tensor(routes_B)
    if routes.ndim != 1:
        raise UserError("route", tuple(routes.shape), "give one route per rollout, shape [B]")
    if routes.numel() == 0:
        return routes.long()
    if routes.is_floating_point() or routes.is_complex() or routes.dtype == torch.bool:
        raise UserError("route", routes.dtype, "give integers: 0 KEEP, 1 ABSORB, 2 ROUTE")
    unknown = routes[(routes < 0) | (routes >= len(Route))]
    if unknown.numel():
        raise UserError("route", int(unknown[0]), "known routes: 0 KEEP, 1 ABSORB, 2 ROUTE")
    return routes.long()


def block_masks(
    routes_B: Tensor | Sequence[int], table: RoutingTable = DEFAULT, weights_B: Tensor | Sequence[float] | None = None
) -> tuple[Float[Tensor, "B 2"], Float[Tensor, "B 2"]]:
    """Forward gate and update mask of every rollout.

    Args:
        routes_B: Integer routes ``[B]`` (see :class:`Route`).
        table: What each route means.
        weights_B: Factor on the update mask of each rollout, in [0, 1]; ``None`` is 1 everywhere.

    Returns:
        ``(forward_gate_B2, update_mask_B2)``, float32, columns (deployed, quarantine), on the routes' device.

    Raises:
        UserError: An unknown route, or a weight that is NaN or outside [0, 1].
    """
    routes = _as_routes(routes_B)
    gate_32, update_32 = table.as_tensors(routes.device)
    gate_B2, update_B2 = gate_32[routes], update_32[routes]
    if weights_B is None:
        return gate_B2, update_B2
    weights = torch.as_tensor(weights_B, dtype=torch.float32, device=routes.device)
    if weights.shape != routes.shape:
        raise UserError("weight", tuple(weights.shape), f"give one weight per rollout, shape [{routes.numel()}]")
    wrong = weights[~((weights >= 0) & (weights <= 1))]
    if wrong.numel():
        raise UserError("weight", float(wrong[0]), "give weights in [0, 1]")
    return gate_B2, update_B2 * weights[:, None]


def activation_gradients(routes_B: Tensor | Sequence[int], table: RoutingTable) -> Float[Tensor, "B 2"]:
    """Factors on the gradient of unit outputs of every rollout, float32, columns (deployed, quarantine)."""
    routes = _as_routes(routes_B)
    rows = [table.masks(route).activation_gradient for route in Route]
    return torch.tensor(rows, dtype=torch.float32, device=routes.device)[routes]


def expand_to_tokens(masks_B2: Float[Tensor, "B 2"], lengths_B: Tensor | Sequence[int]) -> Float[Tensor, "T 2"]:
    """Repeat each rollout's masks over its tokens, for packed inputs without padding (``T = lengths_B.sum()``)."""
    lengths = torch.as_tensor(lengths_B, device=masks_B2.device)
    if lengths.shape != masks_B2.shape[:1]:
        raise UserError("lengths", tuple(lengths.shape), f"give one length per rollout, shape [{len(masks_B2)}]")
    return masks_B2.repeat_interleave(lengths, dim=0)


def expand_to_padded(masks_B2: Float[Tensor, "B 2"], padded_length: int) -> Float[Tensor, "B S 2"]:
    """Repeat each rollout's masks over a padded row of ``padded_length`` tokens (a view, no copy)."""
    return masks_B2[:, None, :].expand(-1, padded_length, -1)


def slice_for_sequence_parallel(
    mask_1T2: Float[Tensor, "1 T 2"], rank: int, size: int, pad_value: float = 1.0
) -> Float[Tensor, "1 t 2"]:
    """The part of packed token masks that one Ulysses sequence-parallel rank holds.

    The token dimension is padded at its end with ``pad_value`` to a multiple of ``size`` and cut into equal parts, as
    the packed inputs are. Concatenating the parts of all ranks gives the padded whole.

    Raises:
        UserError: ``rank`` is not in ``[0, size)``, or the mask is not ``[1, T, 2]``.
    """
    if mask_1T2.ndim != 3 or mask_1T2.shape[0] != 1 or mask_1T2.shape[2] != 2:
        raise UserError("mask", tuple(mask_1T2.shape), "give a packed token mask [1, T, 2]")
    if size < 1 or not 0 <= rank < size:
        raise UserError("rank", rank, f"give a rank in [0, {size})")
    part = math.ceil(mask_1T2.shape[1] / size)
    padded = F.pad(mask_1T2, (0, 0, 0, part * size - mask_1T2.shape[1]), value=pad_value)
    return padded[:, rank * part : (rank + 1) * part].contiguous()
