"""Control directions: what a detector's direction must beat before it may be said to have found something.

Random directions are no 0.5-AUROC detectors: activations vary along few directions, so a single random one can be far
off by luck. Use several (``index``), and report the spread.

Legend: ``D`` directions, ``L`` layers, ``d`` hidden size, ``P`` pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from verl_grad_routing.directions.activation import Direction, difference_of_means
from verl_grad_routing.errors import UserError


def haar_directions(count: int, layers: Sequence[int | str], hidden: int, seed: int) -> Tensor:
    """``count`` independent uniform unit vectors in each layer: float32 ``[D, L, d]``.

    Direction i of layer l depends on ``(seed, i, l, hidden)`` alone, not on ``count`` or the other layers.
    """
    if count < 1 or not layers or hidden < 1:
        raise UserError("directions", (count, tuple(layers), hidden), "at least one direction, layer and dimension")
    rows = [torch.stack([_uniform(seed, index, layer, hidden) for layer in layers]) for index in range(count)]
    return torch.stack(rows).float()


def permuted_pairs(
    unwanted_PLd: Tensor,
    wanted_PLd: Tensor,
    *,
    seed: int,
    layers: Sequence[int | str] | None = None,
    pairs_hash: str | None = None,
) -> Direction:
    """The difference of means after the sides of half of the pairs, drawn by lot, are swapped.

    What the pairs share cancels exactly; what is left is how single pairs happen to differ. Coin flips for each pair
    would not do: the shared part survives any unequal number of swaps, and after normalisation the control is nearly
    the real direction or its reverse. Of an odd number of pairs, one drawn by lot is left out.

    Pair means are those of the swapped pairs. Held-out accuracy is NaN: the pairs that remain when one is held out
    have an excess of the opposite sign.
    """
    generator = torch.Generator().manual_seed(_seed("permuted", seed))
    order = torch.randperm(len(unwanted_PLd), generator=generator)
    half = len(order) // 2
    as_is, swapped = order[:half], order[half : 2 * half]
    unwanted = torch.cat([unwanted_PLd[as_is], wanted_PLd[swapped]])
    wanted = torch.cat([wanted_PLd[as_is], unwanted_PLd[swapped]])
    made = difference_of_means(unwanted, wanted, layers=layers, pairs_hash=pairs_hash, kind="permuted_pairs")
    return replace(made, held_out_accuracy=math.nan)


def _uniform(seed: int, index: int, layer: int | str, hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(_seed("haar", seed, index, layer))
    vector = torch.randn(hidden, generator=generator, dtype=torch.float64)
    return vector / vector.norm()


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
