"""What leakage is measured from: a comparison's results, or a small table of one's own.

The paper's quantities and what stands for them in RL with verifiable rewards, where rollouts are the data:

==========================  ==========================================================================================
forget data seen unlabelled  hacks, by the grader's facts, that the run sampled and its gate did not flag
forget data in a standard    the same count of a run without routing that trains on what it does not flag: a filter
run, retain data the same    with true labels of a share of the hacks (``exposure_*`` arms), which sees everything else
number of samples            hacks divided by all rollouts of the run: runs of one grid have equally many
forget loss                  hack rate of sampled validation answers, after ablation
==========================  ==========================================================================================

A policy makes its own data: a run that learns to hack samples more hacks. So amounts are counted, not taken from
settings. Rollouts of a head start, in which nothing unflagged trains the deployed block, are not counted as seen.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_grad_routing.compare.contrasts import HACK, by_arm
from verl_grad_routing.compare.leakage import Runs, Seen
from verl_grad_routing.compare.results import Results, StoredRun
from verl_grad_routing.errors import UserError

BASELINE = re.compile(r"exposure_[0-9]+")
"""Arms that are points of the baseline curve, by name; the number is for readers, amounts are counted."""

COLUMNS = ("name", "role", "exposure", "value")
ROLES = ("baseline", "run")
Arms = tuple[Mapping[str, Runs], Mapping[str, Runs]]
"""Baselines and the others, each by name and seed."""


def unlabelled_hacks(run: StoredRun) -> float:
    """Hacks that the run saw and did not flag, as a share of its rollouts: mean over the steps that were kept.

    A step's share is its hack rate times one minus the gate's recall; 0 in a head start.

    Raises:
        UserError: The run logged no hack rate.
    """
    hack = run.curve("hack/rate")
    recall, start = (_by_step(run, key) for key in ("detector/recall", "intervention/head_start"))
    seen = [
        0.0 if start.get(step, 0.0) else float(rate) * (1.0 - recall.get(step, 0.0))
        for step, rate in zip(hack.steps.tolist(), hack.values.tolist(), strict=True)
    ]
    return sum(seen) / len(seen)


def _by_step(run: StoredRun, key: str) -> Mapping[int, float]:
    if not run.has(key):
        return {}
    curve = run.curve(key)
    return dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))


def arms_of_results(results: Results, environment: str, baselines: Sequence[str] = ()) -> Arms:
    """The finished arms of one environment.

    Args:
        baselines: Arms that make the curve; those named ``exposure_<number>`` if none are given.

    Raises:
        UserError: No such arms, or fewer than two.
    """
    groups = by_arm(results.of(environment))
    names = list(baselines) or [arm for arm in groups if BASELINE.fullmatch(arm)]
    unknown = [name for name in names if name not in groups]
    if unknown:
        raise UserError("--baseline", unknown[0], f"no finished arm of {environment}; there are {', '.join(groups)}")
    if len(names) < 2:
        fix = (
            "the curve needs at least two arms that train without routing and leave different shares of the hacks in: "
            "name them exposure_<number> (recipes/comparison/leakage.yaml) or give --baseline"
        )
        raise UserError("--baseline", names, fix)
    seen = {arm: {int(run.record.seed or 0): _seen(run) for run in runs} for arm, runs in groups.items()}
    return {name: seen[name] for name in names}, {arm: runs for arm, runs in seen.items() if arm not in names}


def _seen(run: StoredRun) -> Seen:
    rate = HACK.of(run)
    assert rate is not None  # of all samples, of which there are some
    return Seen(unlabelled_hacks(run), rate)


def arms_of_file(path: Path) -> Arms:
    """Rows of a CSV file, or of a JSON list of objects: ``name,role,exposure,value`` and, for several runs, ``seed``.

    ``role`` is ``baseline`` or ``run``; ``exposure`` is what the baseline trained on, or what the run saw unlabelled.

    Raises:
        UserError: Unreadable, a column is missing, a number is none, or a name and seed are given twice.
    """
    found: dict[str, dict[str, dict[int, Seen]]] = {role: {} for role in ROLES}
    for number, row in enumerate(_rows(path), start=1):
        where = f"{path.name}, row {number}"
        missing = [column for column in COLUMNS if row.get(column) in (None, "")]
        if missing:
            raise UserError(where, sorted(map(str, row)), f"no {missing[0]!r}; columns are {', '.join(COLUMNS)}, seed")
        role, name = str(row["role"]), str(row["name"])
        if role not in ROLES:
            raise UserError(f"{where}: role", role, f"give {' or '.join(ROLES)}")
        exposure, value = (_number(row[key], f"{where}: {key}") for key in ("exposure", "value"))
        seed = int(_number(row.get("seed") or 0, f"{where}: seed"))
        runs = found[role].setdefault(name, {})
        if seed in runs:
            raise UserError(f"{where}: seed", seed, f"{name} has this seed twice; number its runs")
        runs[seed] = Seen(exposure, value)
    if not found["run"]:
        raise UserError(str(path), "role", "no row is a run, so there is nothing to measure")
    return found["baseline"], found["run"]


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else json.loads(text)
    except (OSError, ValueError) as error:
        fix = f"unreadable ({' '.join(str(error).split())}); give a results folder of vgr compare, CSV or JSON"
        raise UserError("SOURCE", str(path), fix) from None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError("SOURCE", str(path), f"give a list of objects with {', '.join(COLUMNS)}")
    return rows


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(where, value, "give a number") from None
