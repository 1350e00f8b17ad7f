"""What each arm's detector saw and how much was routed, over the steps that results keep: is a control's mass the
method's?
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from verl_grad_routing.compare.contrasts import by_arm
from verl_grad_routing.compare.grid_tables import marked
from verl_grad_routing.compare.paired import estimate
from verl_grad_routing.compare.results import Results, StoredRun
from verl_grad_routing.compare.tables import NONE, Table

COLUMNS = {
    "detector/auroc": "AUROC against the grader",
    "detector/share_flagged": "flagged",
    "routing/share_route": "routed",
    "routing/share_absorb": "absorbed",
    "routing/share_keep": "kept",
}


def mean_over_steps(run: StoredRun, key: str) -> float | None:
    """Mean of a metric over the steps that have a number; None where none has."""
    values = [float(value) for value in run.curve(key).values if math.isfinite(value)] if run.has(key) else []
    return sum(values) / len(values) if values else None


def signal_values(runs: Sequence[StoredRun]) -> dict[str, dict[int, float]]:
    """Metric -> seed -> its mean over steps, of the metrics that the runs have."""
    found: dict[str, dict[int, float]] = {}
    for key in COLUMNS:
        means = {int(run.record.seed or 0): mean_over_steps(run, key) for run in runs}
        if values := {seed: value for seed, value in means.items() if value is not None}:
            found[key] = values
    return found


def signal_table(results: Results, environment: str) -> Table | None:
    """One row an arm whose runs have any of ``COLUMNS``; None when no run has."""
    rows = []
    for arm, runs in by_arm(results.of(environment)).items():
        values = signal_values(runs)
        if values:
            cells = (str(estimate(list(values[key].values()))) if key in values else NONE for key in COLUMNS)
            rows.append([marked(arm, runs), *cells])
    title = f"{environment}: what was flagged and routed, mean over steps, interquartile mean over seeds"
    return Table(title, ["arm", *COLUMNS.values()], rows) if rows else None
