"""Leakage as a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from verl_grad_routing.compare.leakage import BaselineCurve, Leak, Runs, leaks
from verl_grad_routing.compare.leakage_read import BASELINE, arms_of_results
from verl_grad_routing.compare.results import Results
from verl_grad_routing.compare.tables import NONE, Table
from verl_grad_routing.errors import UserError

CAPTION = (
    "Line: standard training with a growing share of unflagged hacks (mean over seeds, and what a filter leaves). Each "
    "arm stands at the hacks that it saw unlabelled; the line's amount at its height, divided by that, is its leakage "
    "(arXiv 2512.05648, definition G.1). On the line is leakage 1, as of a filter; far below it is what was kept out."
)
TITLE = "leakage of unlabelled hacks"


def leakage_table(title: str, curve: BaselineCurve, found: Sequence[Leak]) -> Table:
    """One row a baseline, then one an arm."""
    points = zip(curve.exposures, curve.values, strict=True)
    rows = [["baseline", NONE, f"{exposure:.4g}", f"{value:.3f}", NONE, NONE, ""] for exposure, value in points]
    for leak in found:
        equivalent = NONE if leak.equivalent is None else f"{leak.equivalent:.4g}"
        seen = [str(leak.seeds), f"{leak.undiscovered:.4g}", f"{leak.value:.3f}"]
        rows.append([leak.arm, *seen, equivalent, str(leak), leak.why or ""])
    header = ["arm", "seeds", "seen unlabelled", "value after ablation", "equivalent amount", "leakage", "note"]
    return Table(title, header, rows)


def notes(curve: BaselineCurve) -> list[str]:
    """What a reader must know of this curve."""
    turn = curve.turns_back
    if turn is None:
        return []
    return [f"The baseline curve turns back between {turn[0]:g} and {turn[1]:g}: what it meets twice is refused."]


def grid_leakage(results: Results, environment: str) -> tuple[BaselineCurve, list[Leak], Mapping[str, Runs]] | None:
    """Of a grid whose arms are named ``exposure_<number>``, at least two of them; None of any other, or unfinished."""
    if sum(bool(BASELINE.fullmatch(arm)) for arm in {str(run.record.arm) for run in results.of(environment)}) < 2:
        return None
    baselines, arms = arms_of_results(results, environment)
    shared = set.intersection(*(set(runs) for runs in baselines.values()))
    arms = {arm: runs for arm, runs in arms.items() if shared & set(runs)}
    try:
        return (*leaks(baselines, arms), arms)
    except UserError:  # cells are missing: no seed is in all baselines, or too few differ
        return None


def grid_leakage_table(results: Results, environment: str) -> Table | None:
    """For the report; None when the grid has no baseline curve."""
    found = grid_leakage(results, environment)
    return leakage_table(f"{environment}: {TITLE}", found[0], found[1]) if found is not None else None
