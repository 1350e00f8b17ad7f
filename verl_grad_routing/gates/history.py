"""The scores that a gate remembers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from verl_grad_routing.directions.checks import require_bool
from verl_grad_routing.errors import UserError


def check_rescore(rescore: bool, window: int) -> None:
    """Refuse to score a history again that has no bound: features of every rollout would be kept. Raises UserError."""
    require_bool("rescore", rescore)
    if rescore and not window:
        fix = "features of that many rollouts are kept to score them again; give a number of rollouts"
        raise UserError("window", window, fix)


class History:
    """Scores of the run in order of arrival.

    Args:
        window: Only the last so many scores are kept, never fewer than the newest batch has: 1 is that batch alone,
            0 the whole run, 8 bytes each.
    """

    def __init__(self, window: int):
        self._window = window
        self._scores = np.empty(0, dtype=np.float64)

    def take(self, scores: np.ndarray) -> np.ndarray:
        """Add a batch; returns all scores kept, the batch included."""
        self._scores = np.concatenate([self._scores, scores])
        if self._window:
            self._scores = self._scores[-max(self._window, len(scores)) :]
        return self._scores

    def __len__(self) -> int:
        return len(self._scores)

    def put(self, scores: np.ndarray) -> None:
        """Other scores of the same rollouts."""
        self._scores = scores

    def to_state(self) -> Tensor:
        return torch.from_numpy(self._scores.copy())

    def load_state(self, state: Tensor) -> None:
        self._scores = state.numpy().copy()
