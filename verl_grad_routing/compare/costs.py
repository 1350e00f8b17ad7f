"""What an arm's steps cost: their median time without generation, against that of both blocks without routing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from verl_grad_routing.compare.runs import Run

REFERENCE = "vanilla_2r"
WARM_UP = 3  # steps at the start of a run that are not timed


def step_seconds(run: Run) -> list[float]:
    """Of every step after the warm-up that logged both: the whole step less generation."""
    rows = [data for step, data in run.rows.items() if step > WARM_UP]
    return [row["timing_s/step"] - row["timing_s/gen"] for row in rows if {"timing_s/step", "timing_s/gen"} <= set(row)]


def cost_ratio(runs: Sequence[Run], reference: Sequence[Run]) -> float | None:
    """Median step of ``runs`` by that of ``reference``, over all steps; None where either logged no times."""
    own, base = ([second for run in group for second in step_seconds(run)] for group in (runs, reference))
    return statistics.median(own) / statistics.median(base) if own and base else None
