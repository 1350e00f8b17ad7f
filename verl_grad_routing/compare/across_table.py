"""The environments of a comparison side by side: how an arm fares as something varies that is no arm, such as size."""

from __future__ import annotations

from verl_grad_routing.compare.contrasts import HACK, HACK_UNKNOWN, SOLVE, by_arm, by_seed
from verl_grad_routing.compare.grid_tables import finished_seeds, marked
from verl_grad_routing.compare.leakage_report import grid_leakage
from verl_grad_routing.compare.paired import estimate
from verl_grad_routing.compare.results import Results
from verl_grad_routing.compare.signal_table import signal_values
from verl_grad_routing.compare.tables import NONE, Table

AUROC = "detector/auroc"
MEASURES = (HACK, HACK_UNKNOWN, SOLVE)
TITLE = "Environments side by side, interquartile mean over seeds"


def across_table(results: Results) -> Table | None:
    """One row an arm and environment, arm by arm; None of a comparison with fewer than two environments to show.

    Detector AUROC is a mean over steps first. Leakage is there where the environment has a baseline curve.
    """
    names = [place["name"] for place in results.grid["environments"]]
    found = {name: by_arm(runs) for name in names if (runs := results.of(name))}
    if len(found) < 2:
        return None
    leaks = {name: _leakage(results, name) for name in found}
    header = ["arm", "environment", "seeds", "detector AUROC", *(measure.title for measure in MEASURES)]
    if any(leaks.values()):
        header.append("leakage")
    rows = []
    for arm in results.arms:
        for name in (name for name, groups in found.items() if arm in groups):
            runs = found[name][arm]
            values = [signal_values(runs).get(AUROC, {}), *(by_seed(runs, measure) for measure in MEASURES)]
            cells = [str(estimate(list(by.values()))) if by else NONE for by in values]
            row = [marked(arm, runs), name, finished_seeds(results, runs), *cells, leaks[name].get(arm, NONE)]
            rows.append(row[: len(header)])
    return Table(TITLE, header, rows)


def _leakage(results: Results, environment: str) -> dict[str, str]:
    found = grid_leakage(results, environment)
    return {leak.arm: str(leak) for leak in found[1]} if found is not None else {}
