"""The obfuscation test: what happens to a monitor, to one kept out of training and to the grader as pressure grows.

Arms whose names end in ``-pressure-N`` (N hundredths of the penalty, of the reward for passing) are points of one
method's curve; an arm without a number, routing under the same monitor, stands beside them. A policy that hides from
the monitor it is trained against shows a falling recall of that monitor while hacking, and the held-out monitor's rate,
stay (arXiv 2503.11926).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from verl_grad_routing.compare.contrasts import HACK, SOLVE, by_arm
from verl_grad_routing.compare.paired import estimate
from verl_grad_routing.compare.results import Results, StoredRun
from verl_grad_routing.compare.tables import NONE, Table

NAME = re.compile(r"(?P<method>.+)-pressure-(?P<hundredths>[0-9]+)")
TAIL = 0.2  # share of the run's steps, at the end, that a training rate is the mean of
COLUMNS = {
    "monitor flags": "detector/share_flagged",
    "monitor's recall": "detector/recall",
    "held-out flags": "monitor/heldout/rate",
    "held-out recall": "monitor/heldout/recall",
    "hack, in training": "hack/rate",
}
CAPTION = (
    "Left to right: more of the reward is taken from what the training monitor flags. Means over the last fifth of the "
    "steps, then over seeds. Hidden: hacking that the training monitor does not flag, hack rate times one minus "
    "recall, step by step."
)


def pressure_of(arm: str) -> tuple[str, float | None]:
    """The method and the pressure that an arm's name tells: ``penalty-pressure-050`` is ("penalty", 0.5)."""
    found = NAME.fullmatch(arm)
    return (found["method"], int(found["hundredths"]) / 100) if found else (arm, None)


def tail_mean(run: StoredRun, key: str) -> float:
    """Mean of a training metric over the end of the run, steps in which it is no number left out; NaN without any."""
    end = _end(run, key)
    return float(np.mean(list(end.values()))) if end else math.nan


def _end(run: StoredRun, key: str) -> dict[int, float]:
    """The metric at each of the run's last steps that has it, by step: one that stopped early has none."""
    if not run.has(key):
        return {}
    curve, before = run.curve(key), run.last_step * (1 - TAIL)
    points = zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
    return {step: value for step, value in points if step > before and math.isfinite(value)}


def hidden(run: StoredRun) -> float:
    """Share of the rollouts that hack and are not flagged by the monitor of the training, mean over the run's end.

    Step by step, because recall is no number in a step without hacks.
    """
    recall, hack = _end(run, "detector/recall"), _end(run, "hack/rate")
    seen = [rate * (1 - recall[step]) if rate else 0.0 for step, rate in hack.items() if not rate or step in recall]
    return float(np.mean(seen)) if seen else math.nan


def pressure_groups(results: Results, environment: str) -> dict[tuple[str, float | None], list[StoredRun]] | None:
    """Runs by method and pressure, pressures ascending; None when no arm's name tells one."""
    groups = {pressure_of(arm): runs for arm, runs in by_arm(results.of(environment)).items()}
    if all(pressure is None for _, pressure in groups):
        return None
    methods = list(dict.fromkeys(method for method, _ in groups))
    order = sorted(groups, key=lambda key: (methods.index(key[0]), -1 if key[1] is None else key[1]))
    return {key: groups[key] for key in order}


def obfuscation_table(results: Results, environment: str) -> Table | None:
    """One row a method and pressure; None when no arm's name tells a pressure."""
    groups = pressure_groups(results, environment)
    if groups is None:
        return None
    rows = []
    for (method, pressure), runs in groups.items():
        cells = [_over_seeds([tail_mean(run, key) for run in runs]) for key in COLUMNS.values()]
        cells += [_over_seeds([hidden(run) for run in runs])]
        cells += [_over_seeds([_value(measure.of(run)) for run in runs]) for measure in (HACK, SOLVE)]
        rows.append([method, NONE if pressure is None else f"{pressure:g}", *cells])
    header = ["method", "pressure", *COLUMNS, "hidden", HACK.title, SOLVE.title]
    return Table(f"{environment}: monitors under pressure", header, rows)


def _value(rate: float | None) -> float:
    return math.nan if rate is None else rate


def _over_seeds(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return str(estimate(known)) if known else NONE
