"""Shares of a history that fades."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from verl_grad_routing.directions.checks import require_int, require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates.base import GATES, PairStatistics
from verl_grad_routing.gates.history import check_rescore
from verl_grad_routing.gates.quantile import QuantileConfig
from verl_grad_routing.gates.thresholds import ThresholdGate, Thresholds


@GATES.register("exponential_quantile")
class ExponentialQuantile(ThresholdGate):
    """Shares of the run's scores, each weighted by ``0.5 ** (age / half_life)``.

    The age of a score is the number of rollouts in all later batches, so rollouts of one batch weigh the same and
    their order does not matter. With W the sum of all weights, a rollout with score s is

    - ROUTE when the scores >= s weigh at most ``route W`` together,
    - KEEP when the scores <= s weigh at most ``keep W`` together,
    - ABSORB otherwise: itself and all its ties count. A half-life without end gives ``history_quantile``.

    With ``rescore`` the remembered rollouts are projected on every new direction, as the lineage's buffer is; without,
    scores are kept as they were made, which is the same as long as the direction does not change (score pass
    ``reference``, or ``refresh_every: 0``). Either way the activations are those of the policy of that time in the
    passes ``policy`` and ``ablated``. The half-life bounds how long they count.

    Weights ``0.5 ** (age / 96 rollouts)``, shares 0.1 and 0.1 and a buffer of 8192 are the lineage's
    (wassname/vGROUT_pub@c067218:src/vgrout/train_config.py, lines 94-115; there the age is counted in single rollouts,
    which makes the thresholds of a prompt group depend on the order of the groups).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantileConfig):
        route: float = 0.1  # share of the weight, from the top, that is routed
        keep: float = 0.1  # share of the weight, from the bottom, that is kept
        half_life: float = 96.0  # rollouts after which a score counts half
        window: int = 8192  # only the last so many rollouts count, never fewer than the batch; 0: the whole run
        rescore: bool = False  # score what is remembered again when the direction has been refreshed; needs a window

        def __post_init__(self) -> None:
            super().__post_init__()
            require_number("half_life", self.half_life)
            if self.half_life <= 0:
                raise UserError("half_life", self.half_life, "give a positive number of rollouts")
            require_int("window", self.window, 0)
            check_rescore(self.rescore, self.window)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._scores = np.empty(0, dtype=np.float64)
        self._arrived = np.empty(0, dtype=np.int64)  # rollouts seen up to the end of each score's batch

    def _thresholds(self, scores: np.ndarray, pairs: PairStatistics) -> Thresholds:
        del pairs
        now = self._seen + len(scores)
        self._scores = np.concatenate([self._scores, scores])
        self._arrived = np.concatenate([self._arrived, np.full(len(scores), now, dtype=np.int64)])
        if self.config.window:
            kept = max(self.config.window, len(scores))
            self._scores, self._arrived = self._scores[-kept:], self._arrived[-kept:]
        weights = 0.5 ** ((now - self._arrived) / self.config.half_life)
        return weighted_share_thresholds(self._scores, weights, self.config.route, self.config.keep)

    @property
    def remembered(self) -> int:
        return len(self._scores)

    def _put(self, scores: np.ndarray) -> None:
        self._scores = scores

    def state_dict(self) -> dict[str, Any]:
        buffer = {"history": torch.from_numpy(self._scores.copy()), "arrived": torch.from_numpy(self._arrived.copy())}
        return {**super().state_dict(), **buffer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._scores, self._arrived = (state[key].numpy().copy() for key in ("history", "arrived"))


def weighted_share_thresholds(population: np.ndarray, weights: np.ndarray, route: float, keep: float) -> Thresholds:
    """Thresholds that single out what weighs the top ``route`` and the bottom ``keep`` share of ``population``.

    Args:
        population: Scores [N].
        weights: Their weights [N], at least one of them positive.
    """
    values, group = np.unique(population, return_inverse=True)
    weight = np.bincount(group, weights=weights)
    total = weight.sum()
    forgiven = 1e-9 * total  # rounding errors of the sums
    at_most = np.cumsum(weight)
    at_least = np.cumsum(weight[::-1])[::-1]
    not_routed = values[at_least > route * total + forgiven]
    not_kept = values[at_most > keep * total + forgiven]
    above = float(not_routed[-1]) if len(not_routed) else -math.inf
    return Thresholds(above, float(not_kept[0]) if len(not_kept) else math.inf, len(population))
