"""The figures: vector graphics, colour-blind-safe (Okabe & Ito 2008), the same bytes for the same runs."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from verl_grad_routing.compare.comparison import arms, views
from verl_grad_routing.compare.runs import Run
from verl_grad_routing.compare.statistics import Rate, mean_interval

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
# With the quarantine, without it, and of runs that have none to delete.
VIEW_STYLES: dict[str, dict[str, Any]] = {
    "as trained": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    "as deployed": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "as trained = as deployed": {"color": "#333333", "marker": "D", "linestyle": "-"},
}
VIEW_NAMES = {
    "as trained": "with quarantine (as trained)",
    "as deployed": "without it (as deployed)",
    "as trained = as deployed": "no quarantine",
}
QUANTITIES = ("hack", "solve")
PER_ROW = 4
MARK_EVERY = 7  # points of a curve, of which one has its arm's mark
PANELS = {"detector/auroc": "detector AUROC", "routing/share_route": "share routed", "routing/share_keep": "share kept"}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "verl-grad-routing",
}


def curves_figure(runs: Sequence[Run]) -> str:
    """Hack rate (above) and solve rate (below) against steps, one column per arm, as SVG text.

    Thin lines are training rollouts. Marks are validations: of one run with Wilson bars; of several seeds each run
    thin, their mean thick with a 95% t interval.
    """
    groups = arms(runs)
    columns = min(len(groups), PER_ROW)
    blocks = -(-len(groups) // PER_ROW)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 2.9 * columns, 0.7 + 3.6 * blocks), layout="constrained")
        axes = figure.subplots(2 * blocks, columns, squeeze=False, sharey=True)
        used: list[str] = []
        for index in range(columns * blocks):
            pair = [axes[2 * (index // columns) + row][index % columns] for row in range(2)]
            if index >= len(groups):
                for axis in pair:
                    axis.set_axis_off()
                continue
            name = list(groups)[index]
            pair[0].set_title(name, fontweight="bold")
            for axis, what in zip(pair, QUANTITIES, strict=True):
                used += _curves(axis, groups[name], what)
            if index % columns == 0:
                pair[0].set_ylabel("hack rate")
                pair[1].set_ylabel("true solve rate")
            pair[0].tick_params(labelbottom=False)
            pair[1].set_xlabel("training step")
        figure.legend(handles=_view_legend(used), loc="outside lower center", ncols=4, columnspacing=1.4)
        return to_svg(figure)


def _curves(axis: Axes, runs: Sequence[Run], what: str) -> list[str]:
    """Draw one quantity of one arm's runs; returns the views that were drawn."""
    axis.set_ylim(-0.03, 1.03)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    names = [name for name, _ in views(runs[0])]
    rollouts: dict[str, Any] = {
        "color": VIEW_STYLES[names[0]]["color"],
        "linewidth": 0.8,
        "alpha": 0.45 if len(runs) == 1 else 0.2,
    }
    for run in runs:
        if run.has(f"{what}/rate"):
            curve = run.curve(f"{what}/rate")
            axis.plot(curve.steps, curve.values, **rollouts)
    for name, deployed in views(runs[0]):
        points = []
        for run in runs:
            tallies = {step: run.rates(step, deployed=deployed).overall for step in run.validation_steps}
            points.append({step: getattr(tally, what) for step, tally in tallies.items()})
        _validations(axis, points, VIEW_STYLES[name])
    return names


def _validations(axis: Axes, points: Sequence[dict[int, Rate]], style: dict[str, Any]) -> None:
    if len(points) == 1:
        steps, rates = list(points[0]), list(points[0].values())
        values = [rate.value for rate in rates]
        thin: dict[str, Any] = {"linewidth": 1.3, "elinewidth": 1.0, "capsize": 1.8, "markersize": 3.8}
        axis.errorbar(steps, values, yerr=_bars(rates), **thin, **style)
        return
    for run in points:
        axis.plot(list(run), [rate.value for rate in run.values()], linewidth=0.7, color=style["color"], alpha=0.6)
    steps = sorted(set.intersection(*(set(run) for run in points)))
    bands = [mean_interval([run[step].value for run in points]) for step in steps]
    mean, low, high = ([band[part] for band in bands] for part in range(3))
    axis.plot(steps, mean, linewidth=1.8, markersize=3.8, **style)
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _view_legend(used: Iterable[str]) -> list[Line2D]:
    present = set(used)
    handles = [
        Line2D([], [], markersize=4, label=VIEW_NAMES[name], **style)
        for name, style in VIEW_STYLES.items()
        if name in present
    ]
    return [*handles, Line2D([], [], color="#888888", linewidth=0.8, label="training rollouts")]


def pareto_figure(runs: Sequence[Run]) -> str:
    """Deployed hack rate against deployed solve rate with Wilson bars, a hollow mark as trained, as SVG text."""
    groups = arms(runs)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.8, 3.7), layout="constrained")
        axis = figure.subplots()
        for index, (name, members) in enumerate(groups.items()):
            color, marker = OKABE_ITO[index % len(OKABE_ITO)], MARKERS[index % len(MARKERS)]
            for member, run in enumerate(members):
                trained, deployed = (run.rates("last", deployed=d).overall for d in (False, True))
                ends = [[tally.solve.value, tally.hack.value] for tally in (trained, deployed)]
                if run.ablates:
                    axis.plot(*zip(*ends, strict=True), color=color, linewidth=0.8, linestyle=":", alpha=0.8)
                    axis.plot(*ends[0], color=color, marker=marker, markerfacecolor="white", markersize=5)
                axis.errorbar(
                    *ends[1],
                    xerr=_bars([deployed.solve]),
                    yerr=_bars([deployed.hack]),
                    color=color,
                    marker=marker,
                    markersize=5.5,
                    elinewidth=1.0,
                    capsize=2.0,
                    linestyle="none",
                    label=name if member == 0 else None,
                )
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="true solve rate", ylabel="hack rate")
        axis.annotate("better ↘", (0.99, 0.01), ha="right", va="bottom", color="#777777", style="italic")
        figure.legend(loc="outside right upper")
        return to_svg(figure)


def detector_figure(runs: Sequence[Run], styles: Mapping[str, Mapping[str, Any]] | None = None) -> str | None:
    """The detector's AUROC against the grader and the routed share, against steps, as SVG text; None without either.

    ``styles`` are matplotlib's of the arms' lines, by their names in ``comparison.arms``; a colour each by default.
    """
    shown = [(name, run) for name, group in arms(runs).items() for run in group]
    panels = {key: title for key, title in PANELS.items() if any(run.has(key) for _, run in shown)}
    if not panels:
        return None
    ordered = {name: {"color": OKABE_ITO[index % len(OKABE_ITO)]} for index, name in enumerate(arms(runs))}
    lines = {name: {"linewidth": 1.1, "markersize": 3.5, **style} for name, style in (styles or ordered).items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 2.7 * len(panels), 2.7), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            axis.set(ylim=(-0.03, 1.03), title=title, xlabel="training step")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
            if key == "detector/auroc":
                axis.axhline(0.5, color="#777777", linewidth=0.8, linestyle=":")
            for index, (name, run) in enumerate(shown):
                if run.has(key):
                    curve = run.curve(key)
                    every = min(MARK_EVERY, len(curve.steps))
                    marks = (index % every, every)  # apart, where curves lie on each other
                    axis.plot(curve.steps, curve.values, alpha=0.85, markevery=marks, **lines[name])
        drawn = dict.fromkeys(name for name, run in shown if any(run.has(key) for key in panels))
        handles = [Line2D([], [], label=name, **lines[name]) for name in drawn]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        return to_svg(figure)


def to_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element, without prologue and date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"


def _bars(rates: Sequence[Rate]) -> list[list[float]]:
    """Lengths of the error bars below and above each value."""
    below = [max(0.0, rate.value - rate.low) for rate in rates]
    above = [max(0.0, rate.high - rate.value) for rate in rates]
    return [below, above]
