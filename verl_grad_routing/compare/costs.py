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
    """``ratio``: the median over ``seeds`` seeds, each a run's median step by that of the reference's run."""

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
    own, base = ({run.record.seed: statistics.median(s) for run in group if (s := step_seconds(run))}
                 for group in (runs, reference))  # fmt: skip
    ratios = [own[seed] / base[seed] for seed in own.keys() & base.keys()]
    return Cost(statistics.median(ratios), len(ratios)) if ratios else None
