"""The absorption curve as a figure."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from verl_grad_routing.compare.absorption import DIALS, Point, curves, measured
from verl_grad_routing.compare.contrasts import by_arm
from verl_grad_routing.compare.figures import MARKERS, OKABE_ITO, STYLE, to_svg
from verl_grad_routing.compare.paired import Estimate
from verl_grad_routing.compare.results import Results
from verl_grad_routing.compare.statistics import Rate

# What each panel shows: rows of the figure, by dial.
SHOWN = {
    "hack rate": {"types": "hack of unlabelled types", "rollouts": "hack, all types", "precision": "hack, all types"},
    "true solve rate": dict.fromkeys(DIALS, "solve"),
}


def absorption_figure(results: Results, environment: str) -> str | None:
    """Deployed hack (above) and solve rate (below) against the labelled share, as SVG text; None without such arms."""
    found = {point: measured(point, runs) for point, runs in curves(results, environment).items()}
    if not found:
        return None
    methods = list(dict.fromkeys(point.method for point in found))
    dials = [dial for dial in DIALS if any(point.dial == dial for point in found)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 3.0 * len(dials), 5.0), layout="constrained")
        axes = figure.subplots(len(SHOWN), len(dials), squeeze=False, sharex=True, sharey=True)
        for row, (title, columns) in zip(axes, SHOWN.items(), strict=True):
            row[0].set_ylabel(title)
            for axis, dial in zip(row, dials, strict=True):
                for index, method in enumerate(methods):
                    points = [(p, v[columns[dial]]) for p, v in found.items() if (p.dial, p.method) == (dial, method)]
                    style = {"color": OKABE_ITO[index % len(OKABE_ITO)], "marker": MARKERS[index % len(MARKERS)]}
                    _line(axis, method, [(point, value) for point, value in points if value is not None], style)
                axis.set(ylim=(-0.03, 1.03), xlim=(-0.04, 1.04))
                axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for axis, dial in zip(axes[-1], dials, strict=True):
            axis.set_xlabel(DIALS[dial])
        _reference(axes, results, environment)
        pairs = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes[0]]
        named = {label: handle for handle, label in (pair for panel in pairs for pair in panel)}
        figure.legend(named.values(), named.keys(), loc="outside right upper")
        return to_svg(figure)


def _line(axis: Axes, method: str, points: list[tuple[Point, Estimate | Rate]], style: dict[str, Any]) -> None:
    """Marks with bars, joined; all labelled, and all rightly, is a control: hollow, and not part of the line."""
    if not points:
        return
    inside = [(point.share, value.value) for point, value in points if point.share < 1]
    if inside:
        axis.plot(*zip(*inside, strict=True), color=style["color"], linewidth=1.3)
    for index, (point, value) in enumerate(points):
        bar = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
        look: dict[str, Any] = {**style, "markerfacecolor": "white"} if point.share == 1 else style
        label = method if index == 0 else None
        axis.errorbar(
            point.share, value.value, yerr=bar, capsize=2.0, elinewidth=1.0, markersize=5, label=label, **look
        )


def _reference(axes: Any, results: Results, environment: str) -> None:
    """The arm that a reader compares with, as a dotted line."""
    name = str(results.grid["reference"])
    runs = by_arm(results.of(environment)).get(name)
    if not runs:
        return
    values = measured(Point("rollouts", name, 1.0), runs)
    for row, columns in zip(axes, SHOWN.values(), strict=True):
        value = values[columns["rollouts"]]
        if value is None:
            continue
        for axis in row:
            axis.axhline(value.value, color="#777777", linestyle=":", linewidth=1.0, label=name)
