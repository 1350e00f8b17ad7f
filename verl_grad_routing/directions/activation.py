"""Directions in activation space, from contrastive pairs, and the projection of rollouts on them.

Layers are counted from 1: layer ``i`` is the residual stream after block ``i``, so layer 0 would be the embeddings.

Legend: ``P`` pairs, ``L`` chosen layers, ``d`` hidden size, ``B`` rollouts, ``D`` directions.

Source: difference of class means of pooled residual activations, as in representation engineering (arXiv 2310.01405)
and persona vectors (arXiv 2507.21509, §2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_int
from verl_grad_routing.directions.pairs import split_held_out
from verl_grad_routing.errors import UserError

LEAVE_ONE_OUT_UP_TO = 30  # pairs; above it, repeated splits
SPLITS, SPLIT_FRACTION = 20, 0.2


@dataclass(frozen=True, eq=False)
class Direction:
    """One unit vector per layer, and how well it tells the pairs apart.

    Attributes:
        vectors_Ld: float32, unit norm in each layer (not so for ``concept_direction``); points from wanted to unwanted
            where it comes from pairs.
        layers: The layers, ascending, 1-based; of bottleneck coordinates, the modules by name.
        hidden_size: d; of bottleneck coordinates, their rank.
        pairs_hash: Content hash of the pairs that it was fitted on, if any.
        kind: How it was made.
        held_out_accuracy: Share of held-out pairs whose unwanted side projects higher than its wanted side on a
            direction fitted to the others; NaN without pairs.
        unwanted_mean, wanted_mean: Mean projection of each side's activations on this direction; NaN without pairs.
        unwanted_scores_P, wanted_scores_P: The projections, float64; empty without pairs.
    """

    vectors_Ld: Tensor
    layers: tuple[int | str, ...]
    hidden_size: int
    pairs_hash: str | None
    kind: str
    held_out_accuracy: float
    unwanted_mean: float
    wanted_mean: float
    unwanted_scores_P: Tensor
    wanted_scores_P: Tensor

    def to_state(self) -> dict[str, Any]:
        """Plain values and tensors, exact."""
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Direction:
        """Inverse of ``to_state``. Raises ``UserError`` when the vectors do not fit the layers and hidden size."""
        direction = cls(**{**state, "layers": tuple(state["layers"])})
        shape = (len(direction.layers), direction.hidden_size)
        if tuple(direction.vectors_Ld.shape) != shape or direction.vectors_Ld.dtype != torch.float32:
            raise UserError(
                "direction", tuple(direction.vectors_Ld.shape), f"the saved vectors must be float32 {shape}"
            )
        return direction


def layers_at_depth(num_layers: int, low: float = 0.60, high: float = 0.75) -> tuple[int, ...]:
    """Layers from ``floor(low * num_layers)`` to ``floor(high * num_layers)``, both included, none below layer 1.

    36 layers: 21..27. 4 layers: 2, 3. At least one layer for every model.

    Raises:
        UserError: Not ``0 <= low <= high <= 1``.
    """
    require_int("num_layers", num_layers, 1)
    if not 0 <= low <= high <= 1:
        raise UserError("depth", (low, high), "give two shares of the depth, 0 <= low <= high <= 1")
    first, last = (max(math.floor(round(share * num_layers, 6)), 1) for share in (low, high))
    return tuple(range(first, last + 1))


def difference_of_means(
    unwanted_PLd: Tensor,
    wanted_PLd: Tensor,
    *,
    layers: Sequence[int | str] | None = None,
    pairs_hash: str | None = None,
    kind: str = "difference_of_means",
    seed: int = 0,
) -> Direction:
    """Per layer the unit vector along mean(unwanted) - mean(wanted), fitted on all pairs, in float64.

    Held-out accuracy leaves one pair out at a time up to 30 pairs, and is averaged over 20 splits above.

    Args:
        unwanted_PLd: Pooled activations of the unwanted sides; row p belongs to the same pair as row p of the other.
        wanted_PLd: Those of the wanted sides.
        layers: Which layers the L slices are; 1..L if not given.
        pairs_hash: Content hash of the pairs.
        kind: Kept with the direction.
        seed: Of the splits.

    Raises:
        UserError: Fewer than two pairs, different shapes, values that are not finite, or equal means in some layer.
    """
    unwanted, wanted, chosen = _checked_sides(unwanted_PLd, wanted_PLd, layers)
    difference_PLd = unwanted - wanted
    vectors = difference_PLd.mean(0)
    norm_L = vectors.norm(dim=-1)
    if (norm_L == 0).any():
        layer = chosen[int((norm_L == 0).nonzero()[0])]
        raise UserError("pairs", f"layer {layer}", "the two sides have the same mean activation here; use other pairs")
    vectors_Ld = _unit(vectors).float()
    unwanted_scores, wanted_scores = (project(side, vectors_Ld[None])[:, 0] for side in (unwanted, wanted))
    return Direction(
        vectors_Ld=vectors_Ld,
        layers=chosen,
        hidden_size=unwanted.shape[2],
        pairs_hash=pairs_hash,
        kind=kind,
        held_out_accuracy=_held_out_accuracy(difference_PLd, seed),
        unwanted_mean=float(unwanted_scores.mean()),
        wanted_mean=float(wanted_scores.mean()),
        unwanted_scores_P=unwanted_scores,
        wanted_scores_P=wanted_scores,
    )


def concept_direction(
    unwanted_PLd: Tensor,
    wanted_PLd: Tensor,
    *,
    layers: Sequence[int | str] | None = None,
    pairs_hash: str | None = None,
    seed: int = 0,
) -> Direction:
    """``d = mean over pairs and layers of (unwanted - wanted)``, not normalised; the same vector at every layer.

    A projection, which averages over layers, is then ``<mean_l h_l, d>``: arXiv 2604.01476, Eqs. 1-3. Arguments and
    errors as for ``difference_of_means``; held-out accuracy is that of the same direction fitted to the other pairs.
    """
    unwanted, wanted, chosen = _checked_sides(unwanted_PLd, wanted_PLd, layers)
    difference_P1d = (unwanted - wanted).mean(1, keepdim=True)
    vector_1d = difference_P1d.mean(0)
    if not vector_1d.any():
        raise UserError("pairs", pairs_hash, "the two sides have the same mean activation; use other pairs")
    vectors_Ld = vector_1d.expand(len(chosen), -1).float().contiguous()
    unwanted_scores, wanted_scores = (project(side, vectors_Ld[None])[:, 0] for side in (unwanted, wanted))
    return Direction(
        vectors_Ld=vectors_Ld,
        layers=chosen,
        hidden_size=unwanted.shape[2],
        pairs_hash=pairs_hash,
        kind="concept",
        held_out_accuracy=_held_out_accuracy(difference_P1d, seed),
        unwanted_mean=float(unwanted_scores.mean()),
        wanted_mean=float(wanted_scores.mean()),
        unwanted_scores_P=unwanted_scores,
        wanted_scores_P=wanted_scores,
    )


def _checked_sides(
    unwanted_PLd: Tensor, wanted_PLd: Tensor, layers: Sequence[int | str] | None
) -> tuple[Tensor, Tensor, tuple[int | str, ...]]:
    """Both sides on the CPU in float64, and the layers; see ``difference_of_means`` for what is refused."""
    if unwanted_PLd.ndim != 3 or unwanted_PLd.shape != wanted_PLd.shape or len(unwanted_PLd) < 2:
        shapes = (tuple(unwanted_PLd.shape), tuple(wanted_PLd.shape))
        raise UserError("pair activations", shapes, "give two tensors [P, L, d] of the same shape with P >= 2")
    unwanted, wanted = (side.detach().to("cpu", torch.float64) for side in (unwanted_PLd, wanted_PLd))
    for side, name in ((unwanted, "unwanted"), (wanted, "wanted")):
        if not torch.isfinite(side).all():
            pair = int((~torch.isfinite(side)).nonzero()[0, 0])
            raise UserError(f"pair activations ({name})", f"pair number {pair + 1}", "activations must be finite")
    depth = unwanted.shape[1]
    chosen: tuple[int | str, ...] = tuple(layers) if layers is not None else tuple(range(1, depth + 1))
    if len(chosen) != depth:
        raise UserError("layers", chosen, f"the activations have {depth} layers")
    return unwanted, wanted, chosen


def without_pairs(vectors_Ld: Tensor, layers: Sequence[int | str], kind: str) -> Direction:
    """A ``Direction`` of given unit vectors that no pairs stand behind."""
    return Direction(
        vectors_Ld=vectors_Ld.float(),
        layers=tuple(layers),
        hidden_size=vectors_Ld.shape[-1],
        pairs_hash=None,
        kind=kind,
        held_out_accuracy=math.nan,
        unwanted_mean=math.nan,
        wanted_mean=math.nan,
        unwanted_scores_P=torch.empty(0, dtype=torch.float64),
        wanted_scores_P=torch.empty(0, dtype=torch.float64),
    )


def project(pooled_BLd: Tensor, vectors_DLd: Tensor) -> Tensor:
    """Mean over layers of ``<h_l, v_l>``: ``[B, D]``, float64.

    Products and sums are float64 in an order that depends on L and d alone, so a row's result is the same bit for bit
    in any batch. Layers with larger activations weigh more, as nothing is normalised.
    """
    if pooled_BLd.shape[1:] != vectors_DLd.shape[1:]:
        shapes = (tuple(pooled_BLd.shape), tuple(vectors_DLd.shape))
        raise ValueError(f"pooled activations and vectors must agree in layers and hidden size, not {shapes}")
    pooled = pooled_BLd.to(torch.float64).flatten(1)
    columns = [_tree_sum(pooled * vector) for vector in vectors_DLd.to(pooled.device, torch.float64).flatten(1)]
    return torch.stack(columns, dim=1) / pooled_BLd.shape[1]


def _tree_sum(values_BN: Tensor) -> Tensor:
    """Sum over the last dimension by elementwise halving: every row for itself, in an order set by N alone."""
    while values_BN.shape[1] > 1:
        half = values_BN.shape[1] // 2
        rest_BN = values_BN[:, 2 * half :]
        values_BN = torch.cat([values_BN[:, :half] + values_BN[:, half : 2 * half], rest_BN], dim=1)
    return values_BN[:, 0]


def _unit(vectors_Ld: Tensor) -> Tensor:
    """Unit norm per layer; a zero vector stays zero."""
    return vectors_Ld / vectors_Ld.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors_Ld.dtype).tiny)


def _held_out_accuracy(difference_PLd: Tensor, seed: int) -> float:
    """Share of held-out differences with a positive mean projection on the direction of the other pairs."""
    pairs = len(difference_PLd)
    if pairs <= LEAVE_ONE_OUT_UP_TO:
        splits = [(tuple(q for q in range(pairs) if q != p), (p,)) for p in range(pairs)]
    else:
        splits = [split_held_out(pairs, SPLIT_FRACTION, seed + number) for number in range(SPLITS)]
    right = total = 0
    for fitted, held_out in splits:
        direction_Ld = _unit(difference_PLd[list(fitted)].mean(0))
        gaps = (difference_PLd[list(held_out)] * direction_Ld).sum(dim=(1, 2))
        right, total = right + int((gaps > 0).sum()), total + len(held_out)
    return right / total
