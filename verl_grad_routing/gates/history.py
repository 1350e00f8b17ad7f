"""The scores that a gate remembers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class History:
    """Scores of the run in order of arrival, as they were made: a refreshed direction does not score them again.

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

    def to_state(self) -> Tensor:
        return torch.from_numpy(self._scores.copy())

    def load_state(self, state: Tensor) -> None:
        self._scores = state.numpy().copy()
