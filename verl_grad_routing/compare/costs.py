"""What an arm's steps cost: their median time without generation, against that of both blocks without routing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from verl_grad_routing.compare.runs import Run

REFERENCE = "vanilla_2r"
WARM_UP = 3  # steps at the start of a run that are not timed


@dataclass(frozen=True)
class Cost:
    """``ratio``: the median over ``seeds`` seeds, each the median step by the reference's on that seed."""

    ratio: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.seeds} seed{'s' * (self.seeds > 1)})"


def step_seconds(run: Run) -> list[float]:
    """Of every step after the warm-up that logged both: the whole step less generation."""
    rows = [data for step, data in run.rows.items() if step > WARM_UP]
    return [row["timing_s/step"] - row["timing_s/gen"] for row in rows if {"timing_s/step", "timing_s/gen"} <= set(row)]


def cost(runs: Sequence[Run], reference: Sequence[Run]) -> Cost | None:
    """Of ``runs`` against ``reference``, paired by seed; None where they share no seed of which both logged times."""
    own, base = _by_seed(runs), _by_seed(reference)
    ratios = [statistics.median(own[seed]) / statistics.median(base[seed]) for seed in own.keys() & base.keys()]
    return Cost(statistics.median(ratios), len(ratios)) if ratios else None


def _by_seed(runs: Sequence[Run]) -> dict[int | None, list[float]]:
    """Seconds of the steps of all runs of a seed; seeds without any are left out."""
    found: dict[int | None, list[float]] = {}
    for run in runs:
        if seconds := step_seconds(run):
            found.setdefault(run.record.seed, []).extend(seconds)
    return found
