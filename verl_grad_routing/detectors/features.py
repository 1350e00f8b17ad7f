"""What the scores in a gate's history were projected from, so that they can be projected on a later direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class FeatureBuffer:
    """Features of the newest rollouts: pooled activations, or coordinates of gradients.

    Shapes: N rollouts remembered, B of one batch, L layers or modules, d hidden size or rank.

    Attributes:
        features_NLd: In the order in which the gate took their scores; ``None`` before the first.
        stale: The direction has changed since the scores were made.
    """

    def __init__(self) -> None:
        self.features_NLd: Tensor | None = None
        self.stale = False

    def take(self, features_BLd: Tensor, keep: int) -> None:
        """Add a batch and forget all but the newest ``keep`` rollouts."""
        kept = features_BLd if self.features_NLd is None else torch.cat([self.features_NLd, features_BLd])
        self.features_NLd = kept[max(len(kept) - keep, 0) :].clone()  # a slice would keep all of it in memory

    def to_state(self) -> dict[str, Any]:
        return {"features_NLd": self.features_NLd, "stale": self.stale}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.features_NLd, self.stale = state["features_NLd"], state["stale"]
