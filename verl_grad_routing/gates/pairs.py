"""Thresholds from the scores of the contrastive pairs themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from verl_grad_routing.directions.checks import require_bool, require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates.base import GATES, PairStatistics
from verl_grad_routing.gates.thresholds import ThresholdConfig, ThresholdGate, Thresholds, ceil_share

NEEDS_PAIRS = "choose a detector with contrastive pairs, or another gate"


@GATES.register("pair_midpoint")
class PairMidpoint(ThresholdGate):
    """Thresholds on the line from the pairs' wanted mean score (0) to their unwanted mean score (1).

    ROUTE above ``wanted + route_at * (unwanted - wanted)``, KEEP below the same with ``keep_at``, both strictly. So
    ``route_at: 0.5, keep_at: 0.0`` routes what is nearer to the unwanted side, and keeps what scores below the mean
    wanted side. Pairs that cover one kind of the unwanted behaviour can misplace the scores of other kinds.
    """

    needs_pair_means = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ThresholdConfig):
        route_at: float = 0.5
        keep_at: float | None = 0.0  # null: nothing is kept

        def __post_init__(self) -> None:
            super().__post_init__()
            require_number("route_at", self.route_at)
            if self.keep_at is not None:
                require_number("keep_at", self.keep_at)
                if self.keep_at > self.route_at:
                    raise UserError("keep_at", self.keep_at, f"give at most route_at ({self.route_at:g})")

    config: Config

    def _thresholds(self, scores: np.ndarray, pairs: PairStatistics) -> Thresholds:
        del scores
        if pairs.means is None:
            raise UserError("grad_routing.gate.name", self.name, NEEDS_PAIRS)
        unwanted, wanted = pairs.means
        if not (math.isfinite(unwanted) and math.isfinite(wanted) and unwanted > wanted):
            fix = "the unwanted sides must score higher on average than the wanted ones; check the pairs"
            raise UserError("pair means (unwanted, wanted)", pairs.means, fix)
        route_at, keep_at = self.config.route_at, self.config.keep_at
        below = -math.inf if keep_at is None else wanted + keep_at * (unwanted - wanted)
        return Thresholds(wanted + route_at * (unwanted - wanted), below)


@GATES.register("pair_band")
class PairBand(ThresholdGate):
    """Thresholds at quantiles of the two sides' own scores: a band between the clean and the unwanted pairs.

    ROUTE above the ``unwanted_quantile`` of the unwanted sides' scores, KEEP below the ``wanted_quantile`` of the
    wanted sides' scores, both strictly, ABSORB in the band between. The q-quantile of P scores is their
    ``max(ceil(q P), 1)``-th lowest: at least a share q of them is at or below it, and nothing is interpolated.

    **Overlap.** Where the unwanted quantile is not above the wanted one the pairs do not tell the sides apart at these
    quantiles (a refreshed direction may lose that). The gate then abstains: the whole batch is ABSORB,
    ``gate/abstained`` is 1, and the two thresholds are logged as they are.

    The band from the 75th percentile of the clean pairs to that of the hack pairs is the lineage's
    (wassname/vGROUT_pub@9c45839:docs/research_journal.md, lines 5540-5556); there, a weight rose linearly inside it.
    """

    needs_pair_means = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ThresholdConfig):
        unwanted_quantile: float = 0.75  # routed above this quantile of the unwanted sides' scores
        wanted_quantile: float = 0.75  # kept below this quantile of the wanted sides' scores
        keep: bool = True  # false: nothing is kept; the wanted quantile still decides about overlap

        def __post_init__(self) -> None:
            super().__post_init__()
            require_number("unwanted_quantile", self.unwanted_quantile, 0, 1)
            require_number("wanted_quantile", self.wanted_quantile, 0, 1)
            require_bool("keep", self.keep)

    config: Config

    def _thresholds(self, scores: np.ndarray, pairs: PairStatistics) -> Thresholds:
        del scores
        if pairs.scores is None:
            raise UserError("grad_routing.gate.name", self.name, NEEDS_PAIRS)
        unwanted_P, wanted_P = (side.detach().to("cpu").double().numpy() for side in pairs.scores)
        for name, side in (("unwanted", unwanted_P), ("wanted", wanted_P)):
            if side.ndim != 1 or not len(side) or not np.isfinite(side).all():
                raise UserError(f"pair scores ({name})", side.tolist(), "give finite scores [P] with P >= 1")
        above = lower_quantile(unwanted_P, self.config.unwanted_quantile)
        below = lower_quantile(wanted_P, self.config.wanted_quantile)
        overlap = above <= below
        return Thresholds(above, below if self.config.keep else -math.inf, abstain=overlap)


def lower_quantile(scores: np.ndarray, share: float) -> float:
    """The ``max(ceil(share N), 1)``-th lowest of N scores; no interpolation."""
    return float(np.sort(scores)[max(ceil_share(share, len(scores)), 1) - 1])
