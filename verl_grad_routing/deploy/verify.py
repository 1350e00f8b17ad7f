"""Does the exported model compute what the training model computes? Logits on seeded random tokens.

The limit: in float32 the two differ by rounding alone, in another order of summation; ``1e-4`` times the scale of the
logits (their largest magnitude, at least 1) leaves an order of magnitude of room. Merged weights saved in a half
precision dtype also carry its rounding; for them the limit is ``16 eps(dtype)`` times that scale, and the merge itself
is held to the float32 limit before the weights are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verl_grad_routing.errors import UserError

FLOAT32_LIMIT = 1e-4
ROUNDING_STEPS = 16
_LENGTHS = (1, 2, 7, 16, 33, 64)
_ROWS = 4
_SEED = 20240


@dataclass(frozen=True)
class Difference:
    """``maximum`` absolute difference between two models' logits, and the ``limit`` it was held to."""

    maximum: float
    limit: float

    def __str__(self) -> str:
        return f"max abs logit difference {self.maximum:.3g} (limit {self.limit:.3g})"


def probe_tokens(model: nn.Module, seed: int = _SEED) -> list[Tensor]:
    """Random token ids, one [4, length] batch for each of several lengths within the model's positions."""
    config = model.config
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    positions = getattr(config, "max_position_embeddings", None) or max(_LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted({min(length, positions) for length in _LENGTHS})
    return [torch.randint(vocabulary, (_ROWS, length), generator=generator) for length in lengths]


@torch.no_grad()
def logits_on(model: nn.Module, probes: Sequence[Tensor]) -> list[Tensor]:
    """Float32 logits [4, length, vocabulary] of every batch."""
    return [model(input_ids=ids, use_cache=False).logits.float() for ids in probes]


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Largest absolute difference; NaN where either is not finite."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max())


def limit_for(dtype: torch.dtype, reference: Sequence[Tensor]) -> float:
    """The limit of this module's docstring, for weights in ``dtype`` and the reference's logits."""
    scale = max(1.0, *(float(logits.abs().max()) for logits in reference))
    relative = FLOAT32_LIMIT if dtype in (torch.float32, torch.float64) else ROUNDING_STEPS * torch.finfo(dtype).eps
    return relative * scale


def compare(
    reference: Sequence[Tensor],
    exported: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    max_difference: float | None = None,
) -> Difference:
    """Hold the exported model's logits against the training model's.

    Args:
        reference: Logits of the training model.
        exported: Logits of the exported one on the same tokens.
        dtype: Of the exported weights.
        max_difference: Limit, instead of the one that follows from ``dtype``.

    Raises:
        UserError: The difference is above the limit, or not a number.
    """
    limit = limit_for(dtype, reference) if max_difference is None else max_difference
    difference = Difference(largest_difference(reference, exported), limit)
    if not difference.maximum <= limit:
        fix = f"the exported model is not the trained one (limit {limit:.3g}); nothing was written"
        raise UserError("max abs logit difference", difference.maximum, fix)
    return difference
