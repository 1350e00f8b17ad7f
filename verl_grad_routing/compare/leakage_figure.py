"""The baseline curve and the arms beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from verl_grad_routing.compare.contrasts import by_arm
from verl_grad_routing.compare.figures import STYLE, to_svg
from verl_grad_routing.compare.grid_figures import arm_styles
from verl_grad_routing.compare.leakage import BaselineCurve, Leak, Runs
from verl_grad_routing.compare.leakage_read import BASELINE
from verl_grad_routing.compare.leakage_report import grid_leakage
from verl_grad_routing.compare.results import Results, StoredRun


def grid_leakage_figure(results: Results, environment: str) -> str | None:
    """For the report; None when the grid has no baseline curve."""
    found = grid_leakage(results, environment)
    return leakage_figure(results.of(environment), *found) if found is not None else None


def leakage_figure(
    runs: Sequence[StoredRun], curve: BaselineCurve, found: Sequence[Leak], arms: Mapping[str, Runs]
) -> str:
    """Hack rate as deployed against hacks seen unlabelled, every seed a small mark, as SVG text."""
    styles = arm_styles({arm: members for arm, members in by_arm(runs).items() if not BASELINE.fullmatch(arm)})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.8), layout="constrained")
        axis = figure.subplots()
        line = {"color": "#333333", "marker": "o", "markersize": 4, "linewidth": 1.4}
        axis.plot(curve.exposures, curve.values, label="standard training", **line)
        for leak in found:
            seen, style = arms[leak.arm].values(), styles[leak.arm]
            small = {**style, "markersize": 3, "alpha": 0.5, "linestyle": "none"}
            axis.plot([one.exposure for one in seen], [one.value for one in seen], **small)
            label = f"{leak.arm}: {leak}"
            axis.plot(leak.undiscovered, leak.value, linestyle="none", label=label, **{"markersize": 6.5, **style})
        axis.set(ylim=(-0.03, 1.03), xlabel="hacks seen unlabelled, share of rollouts", ylabel="hack rate, deployed")
        figure.legend(loc="outside right upper")
        return to_svg(figure)
