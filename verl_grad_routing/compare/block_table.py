"""What each block holds: the block-swap ablation, its selectivity, and the quarantine's share of the updates.

Both models of the swap are the trained one with a block deleted: the deployed block alone is what is deployed, the
quarantine alone is the control. *Selectivity* is ours, bounded by -1 and 1::

    hack rate of the quarantine alone  -  hack rate of the deployed block alone
    solve rate of the deployed block alone  -  solve rate of the quarantine alone

1: all hacking (or none of the solving) sits in the quarantine; 0: the blocks are alike, as two halves of one model that
routing did not tell apart; below 0: they have changed places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from verl_grad_routing.compare.contrasts import by_arm
from verl_grad_routing.compare.grid_tables import marked
from verl_grad_routing.compare.paired import estimate
from verl_grad_routing.compare.results import Results, StoredRun
from verl_grad_routing.compare.swapped import swapped_rate
from verl_grad_routing.compare.tables import NONE, Table

SHARE = "routing/update_share/quarantine"
HEADER = (
    "arm",
    "seeds",
    "hack, both blocks",
    "hack, deployed alone",
    "hack, quarantine alone",
    "selectivity, hack",
    "solve, deployed alone",
    "solve, quarantine alone",
    "selectivity, solve",
    "quarantine's share of updates",
)


def rate(run: StoredRun, what: str, deployed: bool) -> float:
    """Of the last validation, with both blocks or the deployed one alone."""
    return getattr(run.rates("last", deployed=deployed).overall, what).value


def selectivity(run: StoredRun, what: str) -> float | None:
    """Of ``hack`` or ``solve``, see the module; None of a run that did not validate the quarantine alone."""
    alone = swapped_rate(run, what)
    if alone is None:
        return None
    return (alone - rate(run, what, True)) * (1 if what == "hack" else -1)


def update_share(run: StoredRun) -> float | None:
    """Mean over the steps of the quarantine's share of the update norms; None where it was not logged."""
    return float(run.curve(SHARE).values.mean()) if run.has(SHARE) else None


def block_table(results: Results, environment: str) -> Table | None:
    """One row an arm with blocks; None when no run has an update share or a swapped validation."""
    columns: list[Callable[[StoredRun], float | None]] = [
        lambda run: rate(run, "hack", False),
        lambda run: rate(run, "hack", True),
        lambda run: swapped_rate(run, "hack"),
        lambda run: selectivity(run, "hack"),
        lambda run: rate(run, "solve", True),
        lambda run: swapped_rate(run, "solve"),
        lambda run: selectivity(run, "solve"),
        update_share,
    ]
    rows = []
    for arm, runs in by_arm(results.of(environment)).items():
        if any(run.has(SHARE) or swapped_rate(run, "hack") is not None for run in runs):
            rows.append([marked(arm, runs), str(len(runs)), *(_over_seeds(runs, column) for column in columns)])
    title = f"{environment}: what each block holds, interquartile mean over seeds"
    return Table(title, list(HEADER), rows) if rows else None


def _over_seeds(runs: Sequence[StoredRun], column: Callable[[StoredRun], float | None]) -> str:
    values = [value for run in runs if (value := column(run)) is not None]
    return str(estimate(values)) if values else NONE
