"""Figures of a comparison over seeds; the curves and the detector's are ``figures``'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from verl_grad_routing.compare.comparison import arms
from verl_grad_routing.compare.contrasts import HACK, SOLVE, by_arm, hack_by_type, is_control
from verl_grad_routing.compare.figures import MARKERS, OKABE_ITO, PER_ROW, STYLE, detector_figure, to_svg
from verl_grad_routing.compare.grid_tables import marked
from verl_grad_routing.compare.paired import Estimate, estimate
from verl_grad_routing.compare.results import StoredRun

CONTROL_COLOR = "#777777"
Groups = Mapping[str, Sequence[StoredRun]]


def pareto_seeds_figure(runs: Sequence[StoredRun]) -> str:
    """Deployed hack rate against deployed solve rate, as SVG text.

    Each arm's interquartile mean with bootstrap bars, every seed a small mark. Controls are grey and hollow, one that
    reads the grader's truth is a black star.
    """
    groups = by_arm(runs)
    styles = arm_styles(groups)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 4.2), layout="constrained")
        axis = figure.subplots()
        for arm, members in groups.items():
            style = styles[arm]
            points = [(SOLVE.of(run), HACK.of(run)) for run in members]
            solve, hack = (estimate([float(value or 0.0) for value in values]) for values in zip(*points, strict=True))
            if len(points) > 1:
                small = {**style, "markersize": 3, "alpha": 0.5, "linestyle": "none"}
                axis.plot(*zip(*points, strict=True), **small)
            axis.errorbar(
                solve.value,
                hack.value,
                xerr=_bar(solve),
                yerr=_bar(hack),
                elinewidth=1.0,
                capsize=2.0,
                linestyle="none",
                label=marked(arm, members),
                **{"markersize": 6.5, **style},
            )
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="true solve rate", ylabel="hack rate")
        axis.annotate("better ↘", (0.99, 0.01), ha="right", va="bottom", color="#777777", style="italic")
        figure.legend(loc="outside right upper")
        return to_svg(figure)


def types_figure(runs: Sequence[StoredRun]) -> str | None:
    """Deployed hack rate of each arm, one panel a loophole type, as SVG text; None when the samples tell no types."""
    groups = by_arm(runs)
    types, rates = hack_by_type(groups)
    if not types:
        return None
    styles, columns, blocks = arm_styles(groups), min(len(types), PER_ROW), -(-len(types) // PER_ROW)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 1.9 * columns, blocks * (0.9 + 0.26 * len(groups))), layout="constrained")
        axes = figure.subplots(blocks, columns, squeeze=False, sharex=True, sharey=True)
        for index, axis in enumerate(axes.flat):
            if index >= len(types):
                axis.set_axis_off()
                continue
            name = list(types)[index]
            axis.set_title(f"{name} ({'known' if types[name] else 'unknown'})")
            for row, arm in enumerate(groups):
                if name in rates[arm]:
                    _row(axis, row, rates[arm][name], styles[arm])
        first = axes[0][0]
        first.set_yticks(range(len(groups)), [marked(arm, members) for arm, members in groups.items()])
        first.set(xlim=(-0.03, 1.03), ylim=(len(groups) - 0.5, -0.5))
        figure.supxlabel("hack rate, as deployed", fontsize=8.5)
        return to_svg(figure)


def signals_figure(runs: Sequence[StoredRun]) -> str | None:
    """``detector_figure`` in the colours and with the marks of the other figures."""
    styles = arm_styles(by_arm(runs))
    return detector_figure(runs, {name: styles[str(members[0].record.arm)] for name, members in arms(runs).items()})


def arm_styles(groups: Groups) -> dict[str, dict[str, Any]]:
    """Colour and marker of every arm: by its kind first, so that figures read without colour."""
    styles: dict[str, dict[str, Any]] = {}
    methods = controls = 0
    colors = OKABE_ITO[:-1]  # black is the oracle's
    for arm, members in groups.items():
        if members[0].record.control:
            styles[arm] = {"color": "#000000", "marker": "*"}
        elif is_control(members):
            marker = MARKERS[controls % len(MARKERS)]
            styles[arm] = {"color": CONTROL_COLOR, "marker": marker, "markerfacecolor": "white"}
            controls += 1
        else:
            marker = MARKERS[(methods + methods // len(colors)) % len(MARKERS)]
            styles[arm] = {"color": colors[methods % len(colors)], "marker": marker}
            methods += 1
    return styles


def _row(axis: Axes, row: int, rates: Sequence[float], style: dict[str, Any]) -> None:
    middle = estimate(rates)
    if len(rates) > 1:
        small = {**style, "markersize": 2.5, "alpha": 0.5, "linestyle": "none"}
        axis.plot(rates, [row] * len(rates), **small)
    axis.errorbar(middle.value, row, xerr=_bar(middle), capsize=2.0, elinewidth=1.0, **{"markersize": 5, **style})


def _bar(value: Estimate) -> list[list[float]]:
    return [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
