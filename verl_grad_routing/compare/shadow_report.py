"""What a run's methods in shadow said (metrics ``compare/*``): one table and one figure of the report."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from verl_grad_routing.compare.comparison import labels
from verl_grad_routing.compare.figures import OKABE_ITO, STYLE, to_svg
from verl_grad_routing.compare.runs import Run
from verl_grad_routing.compare.tables import NONE, Table
from verl_grad_routing.shadows import ARM

PREFIX = "compare/"
OWN = "the run's own"
# metric below compare/<name>/ -> its heading; those of the first group are drawn
DRAWN = {
    "score_correlation": "rank correlation",
    "overlap": "overlap of flagged",
    "auroc": "AUROC",
    "advantage_mass_discarded": "advantage mass discarded",
    "gradient_cosine_deployed": "gradient cosine, deployed",
}
LISTED = {
    **DRAWN,
    "kappa": "kappa",
    "share_flagged": "share flagged",
    "gradient_cosine": "gradient cosine, both",
    "seconds": "seconds a step",
}
OWN_KEYS = {"auroc": "detector/auroc", "share_flagged": "detector/share_flagged"}
NEGATIVE = ("score_correlation", "gradient_cosine_deployed")
CAPTION = (
    "Methods in shadow score the same rollouts of the same step and change nothing. Rank correlation of their scores "
    "with the run's own; overlap (Jaccard) of the rollouts that both take for the unwanted behaviour; AUROC against "
    "the grader's hack flag, which this metric alone reads; share of the advantages' absolute sum that would not reach "
    "what is deployed; cosine of the deployed block's gradient under each with the run's own. The black line is the "
    "run's own method."
)


def shadow_names(run: Run) -> list[str]:
    """The shadows that the run logged, in alphabetical order."""
    found = {key.removeprefix(PREFIX).partition("/")[0] for key in run.keys if key.startswith(PREFIX)}
    return sorted(found - {ARM})


def shadow_table(runs: Sequence[Run]) -> Table | None:
    """Means over steps of every shadow of every run, its run's own method first; None when no run has any."""
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        names = shadow_names(run)
        for name in [ARM, *names] if names else []:
            rows.append([label, OWN if name == ARM else name, *(_mean(run, _key(name, metric)) for metric in LISTED)])
    return Table("Methods in shadow, means over steps", ["run", "method", *LISTED.values()], rows) if rows else None


def shadow_figure(runs: Sequence[Run]) -> str | None:
    """The drawn metrics against steps, a row of panels a run, a line a shadow, as SVG text; None without any."""
    shown = [(run, label) for run, label in zip(runs, labels(runs), strict=True) if shadow_names(run)]
    metrics = [m for m in DRAWN if any(run.has(_key(name, m)) for run, _ in shown for name in shadow_names(run))]
    if not metrics:
        return None
    names = list(dict.fromkeys(name for run, _ in shown for name in shadow_names(run)))
    colors = {name: OKABE_ITO[index % (len(OKABE_ITO) - 1)] for index, name in enumerate(names)} | {ARM: OKABE_ITO[-1]}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.8 + 2.2 * len(metrics), 0.7 + 2.2 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), len(metrics), squeeze=False, sharex="row")
        for row, (run, label) in zip(axes, shown, strict=True):
            row[0].set_ylabel(label)
            for axis, metric in zip(row, metrics, strict=True):
                axis.set(title=DRAWN[metric], xlabel="training step")
                axis.set_ylim(-1.05 if metric in NEGATIVE else -0.03, 1.05)
                axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
                for name in [ARM, *shadow_names(run)]:
                    if run.has(_key(name, metric)):
                        curve = run.curve(_key(name, metric))
                        marker = "." if len(curve.steps) < 8 else ""
                        axis.plot(curve.steps, curve.values, color=colors[name], linewidth=1.1, marker=marker)
        handles = [Line2D([], [], color=colors[name], label=OWN if name == ARM else name) for name in [ARM, *names]]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        return to_svg(figure)


def _key(name: str, metric: str) -> str:
    return OWN_KEYS[metric] if name == ARM and metric in OWN_KEYS else f"{PREFIX}{name}/{metric}"


def _mean(run: Run, key: str) -> str:
    return f"{fmean(run.curve(key).values):.3g}" if run.has(key) else NONE
