"""The obfuscation test as a figure: what monitors and grader see against pressure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from verl_grad_routing.compare.contrasts import by_arm
from verl_grad_routing.compare.figures import MARKERS, OKABE_ITO, STYLE, to_svg
from verl_grad_routing.compare.obfuscation import COLUMNS, hidden, pressure_of, tail_mean
from verl_grad_routing.compare.results import StoredRun


def obfuscation_figure(runs: Sequence[StoredRun]) -> str | None:
    """Rates against pressure, a panel a method, as SVG text; None when no arm's name tells a pressure."""
    lines: dict[str, dict[float, list[StoredRun]]] = {}
    for arm, members in by_arm(runs).items():
        method, pressure = pressure_of(arm)
        if pressure is not None:
            lines.setdefault(method, {})[pressure] = members
    if not lines:
        return None
    drawn = {
        "hack": "hack/rate",
        "monitor flags": COLUMNS["monitor flags"],
        "held-out flags": COLUMNS["held-out flags"],
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 3.0 * len(lines), 3.0), layout="constrained")
        axes = figure.subplots(1, len(lines), squeeze=False, sharey=True)
        for axis, (method, points) in zip(axes.flat, lines.items(), strict=True):
            pressures = sorted(points)
            for index, (label, key) in enumerate(drawn.items()):
                means = [np.nanmean([tail_mean(run, key) for run in points[p]] or [math.nan]) for p in pressures]
                axis.plot(pressures, means, color=OKABE_ITO[index], marker=MARKERS[index], label=label)
            shown = [float(np.mean([hidden(run) for run in points[p]])) for p in pressures]
            axis.plot(pressures, shown, color="#777777", linestyle="--", label="hidden")
            axis.set(ylim=(-0.03, 1.03), xlabel="pressure", title=method)
        axes[0, 0].set_ylabel("share of rollouts")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
        return to_svg(figure)
