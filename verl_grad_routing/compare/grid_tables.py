"""The tables of a comparison over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from verl_grad_routing.compare.comparison import CONTROL_MARK, CONTROL_NOTE, LABELS_MARK, LABELS_NOTE, labels
from verl_grad_routing.compare.contrasts import (
    BEFORE,
    HACK,
    MEASURES,
    SOLVE,
    Measure,
    baselines,
    by_arm,
    by_seed,
    contrasts,
    hack_by_type,
)
from verl_grad_routing.compare.costs import REFERENCE, WARM_UP
from verl_grad_routing.compare.paired import ALPHA, POWER, STATEMENT_SEEDS, estimate, least_p
from verl_grad_routing.compare.results import Results, StoredRun, differing
from verl_grad_routing.compare.statistics import CONFIDENCE, Rate
from verl_grad_routing.compare.tables import NONE, Table

SELECTION = "val"  # the split that settings are chosen on
LABELS = "labels"  # of detectors.Signal
Groups = Mapping[str, Sequence[StoredRun]]


def arms_table(results: Results, environment: str) -> Table:
    """Every arm's rates over its seeds, and what its worst seed deploys: an average hides the one that failed.

    On top the rates that the reference arm starts from, as every other does but for its own settings.
    """
    rows, groups = [], by_arm(results.of(environment))
    start = groups.get(results.grid["reference"]) or next(iter(groups.values()))
    before = [list(by_seed(start, measure).values()) for measure in BEFORE]
    if any(before):
        cells = [str(estimate(rates)) if rates else NONE for rates in before]
        rows.append(["before training", NONE, NONE, *cells, NONE, NONE])
    for arm, runs in groups.items():
        values = [list(by_seed(runs, measure).values()) for measure in MEASURES]
        cells = [str(estimate(rates)) if rates else NONE for rates in values]
        worst = [f"{max(by_seed(runs, HACK).values()):.2f}", f"{min(by_seed(runs, SOLVE).values()):.2f}"]
        rows.append([marked(arm, runs), runs[0].signal, finished_seeds(results, runs), *cells, *worst])
    header = ["arm", "signal", "seeds", *(measure.title for measure in MEASURES)]
    header += ["most hack of a seed, as deployed", "least solve of a seed, as deployed"]
    return Table(f"{environment}: rates after training, interquartile mean over seeds", header, rows)


def contrast_table(results: Results, environment: str, measure: Measure) -> Table | None:
    """Every arm minus each baseline in one measure, on paired seeds; None when no two arms share a finished seed."""
    groups = by_arm(results.of(environment))
    names = baselines(results)
    found = {name: {c.arm: c for c in contrasts(groups, name, measure)} for name in names}
    rows = []
    for arm, runs in groups.items():
        if not any(arm in found[name] for name in names):
            continue
        cells = []
        for name in names:
            contrast = found[name].get(arm)
            if contrast is None:
                cells += [NONE] * 4
            else:
                entry = contrast.difference
                ps = [f"{p:.3f}" if entry.seeds > 1 else NONE for p in (entry.p, contrast.p_holm)]
                cells += [str(entry), *ps, _detectable(entry.detectable)]
        seeds = {name: found[name][arm].difference.seeds for name in names if arm in found[name]}
        same = len(set(seeds.values())) == 1
        shown = str(next(iter(seeds.values()))) if same else ", ".join(f"{n} with {name}" for name, n in seeds.items())
        rows.append([marked(arm, runs), shown, *cells])
    header = ["arm", "seeds"]
    for name in names:
        header += [f"minus {name}", f"p, {name}", f"p after Holm, {name}", f"detectable, {name}"]
    return Table(f"{environment}: {measure.title}, paired differences", header, rows) if rows else None


def kinds_table(results: Results, environment: str) -> Table | None:
    """Hack rate as deployed by loophole type; None when the samples tell no types."""
    groups = by_arm(results.of(environment))
    types, rates = hack_by_type(groups)
    if not types:
        return None
    rows = [
        [marked(arm, runs), *(str(estimate(rates[arm][name])) if name in rates[arm] else NONE for name in types)]
        for arm, runs in groups.items()
    ]
    header = ["arm", *(f"{name} ({'known' if known else 'unknown'})" for name, known in types.items())]
    return Table(f"{environment}: hack rate as deployed by loophole type, interquartile mean over seeds", header, rows)


def seeds_table(results: Results, environment: str) -> Table | None:
    """Every single run with its counts; None when there is none."""
    runs = results.of(environment)
    if not runs:
        return None
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        trained, deployed = (run.rates("last", deployed=view).overall for view in (False, True))
        rates = (trained.hack, trained.solve, deployed.hack, deployed.solve)
        rows.append([label, str(run.validation_steps[-1]), *(_counted(rate) for rate in rates)])
    header = ["run", "step", "hack, as trained", "solve, as trained", "hack, as deployed", "solve, as deployed"]
    return Table(f"{environment}: every run, hits of samples with Wilson interval", header, rows)


def status_table(results: Results) -> Table:
    """How many cells of each arm are finished, and what became of the others: nothing is hidden."""
    rows = []
    failures = {(failure.environment, failure.arm, failure.seed): failure.error for failure in results.failures}
    unfinished = set(results.unfinished())
    for place in results.grid["environments"]:
        for arm in results.arms:
            cells = [cell for cell in results.cells() if cell[:2] == (place["name"], arm)]
            missing = [str(cell[2]) for cell in cells if cell in unfinished]
            failed = [f"seed {cell[2]}: {failures[cell]}" for cell in cells if cell in failures]
            finished = len(cells) - len(missing) - len(failed)
            row = [place["name"], arm, f"{finished} of {len(cells)}", ", ".join(missing) or NONE]
            rows.append([*row, " | ".join(failed) or NONE])
    return Table("Cells", ["environment", "arm", "finished", "unfinished seeds", "failed"], rows)


def shared_table(results: Results) -> Table:
    """What every arm shares, and how each environment was built."""
    grid = results.grid
    rows = [
        ["every run", "steps", str(grid["steps"])],
        ["every run", "seeds", ", ".join(map(str, grid["seeds"]))],
        *(["every run", *_override(override)] for override in grid["overrides"]),
    ]
    for place in grid["environments"]:
        name = place["name"]
        rows += [[name, "vgr prepare", place["prepare"] or "a folder that was given"], [name, "split", place["split"]]]
        rows += [[name, f"--set {key}", json.dumps(value)] for key, value in sorted(place["options"].items())]
        rows += [[name, *_override(override)] for override in place["overrides"]]
    return Table("Settings", ["of", "setting", "value"], rows)


def arm_settings_table(results: Results) -> Table:
    """What each arm is; settings that all share are ``shared_table``'s."""
    signals = {str(run.record.arm): (run.record.detector or NONE, run.signal) for run in results.runs}
    rows = [
        [arm["name"], arm["preset"], *signals.get(arm["name"], (NONE, NONE)), " ".join(arm["overrides"]) or NONE]
        for arm in results.grid["arms"]
    ]
    return Table("Arms", ["arm", "preset", "detector", "signal", "overrides"], rows)


def versions_table(results: Results) -> Table:
    """Versions of packages and code of the finished cells, every one that occurs."""
    found: dict[str, dict[str, None]] = {}
    for run in sorted(results.runs, key=lambda run: run.name):
        record = run.record
        entries = {**(record.versions or {}), "training code": record.code, "revision": record.revision}
        entries["system"] = (record.machine or {}).get("system")
        for key, value in entries.items():
            found.setdefault(key, {})[str(value)] = None
    return Table("Versions", ["of", "version"], [[key, ", ".join(values)] for key, values in found.items()])


def grid_notes(results: Results) -> list[str]:
    """What a reader must know to read the tables."""
    seeds = results.grid["seeds"]
    groups = by_arm(results.runs).values()
    most = max((len({run.record.seed for run in runs}) for runs in groups), default=len(seeds))
    reachable = least_p(most)
    unreachable = f", so none below {ALPHA:g}: read the intervals" if reachable > ALPHA else ""
    said = [
        f"Rates over seeds are interquartile means (arXiv 2108.13264) with {CONFIDENCE:.0%} bootstrap intervals over "
        "seeds, expanded for their small number (arXiv 1411.5279); the worst seed stands beside them. Single runs have "
        f"Wilson intervals, which take samples as independent. Seeds: {', '.join(map(str, seeds))}.",
        f"Differences are paired by seed: the mean, its {CONFIDENCE:.0%} bootstrap interval, the two-sided "
        f"sign-flip p, and that p after Holm's correction over the arms of the column. {most} seeds can give no "
        f"p below {reachable:.3g}{unreachable}, and no interval of theirs covers more than {1 - reachable:.0%}. Fewer "
        f"than {STATEMENT_SEEDS} seeds state nothing.",
        f"{range_note(most)} Statements on top are marked by their own two intervals, without a correction for how "
        "many there are: of many arms that change nothing, some would be marked. In how many seeds hacking was "
        "lower stands beside each.",
        "Detectable, for planning: the mean paired difference that as many seeds, scattering as these did, would find "
        f"with {POWER:.0%} power (two-sided paired t test at {ALPHA:g}, one comparison). What these exclude their "
        "intervals say.",
    ]
    said.append(
        "Every run of an environment starts from the one model that was built for it, so no interval says what another "
        "build would do. Cells that ran at the same time shared the machine: compare their times with care."
    )
    if REFERENCE in results.arms:
        said.append(
            f"A cost is a run's median step without generation, the first {WARM_UP} left out, by that of {REFERENCE} "
            "on the same seed: the median over seeds. One or two seeds on a machine that is shared say little."
        )
    for place in results.grid["environments"]:
        split = place["split"]
        purpose = ": these numbers are for choosing settings, report from another split" if split == SELECTION else ""
        said.append(f"{place['name']}: rates after training are of the split {split}{purpose}.")
    said += [f"{text}." for text in mark_notes(results.runs)]
    if mixed := differing(results.runs):
        said.append(f"Runs of different {', '.join(mixed)} stand side by side here: see Versions, and each run's JSON.")
    if results.extra:
        said.append(f"Results of cells that this grid does not have, left out: {', '.join(results.extra)}.")
    return said


def finished_seeds(results: Results, runs: Sequence[StoredRun]) -> str:
    """How many of the grid's seeds these runs are, and which are missing: rates over other seeds are not paired."""
    every = results.grid["seeds"]
    missing = [str(seed) for seed in every if seed not in {run.record.seed for run in runs}]
    return f"{len(runs)} of {len(every)} (not {', '.join(missing)})" if missing else str(len(runs))


def range_note(most: int) -> str:
    """What an interval of a rate over ``most`` seeds at most is."""
    if most <= STATEMENT_SEEDS:
        return f"Up to {STATEMENT_SEEDS} seeds, the interval of a rate runs from the least to the largest seed."
    return f"Intervals are {CONFIDENCE:.0%} bootstrap intervals over seeds."


def marked(arm: str, runs: Sequence[StoredRun]) -> str:
    """The arm's name, marked where its detector reads the truth or a part of it."""
    mark = CONTROL_MARK if runs[0].record.control else LABELS_MARK if runs[0].signal == LABELS else ""
    return f"{arm} {mark}".rstrip()


def mark_notes(runs: Sequence[StoredRun]) -> list[str]:
    """What the marks of these runs' arms mean."""
    controls = any(run.record.control for run in runs)
    labelled = any(run.signal == LABELS and not run.record.control for run in runs)
    return [CONTROL_NOTE] * controls + [LABELS_NOTE] * labelled


def _override(override: str) -> list[str]:
    """Key and value of a Hydra override."""
    key, _, value = override.partition("=")
    return [key, value or NONE]


def _counted(rate: Rate) -> str:
    return f"{rate.hits}/{rate.total} {rate}"


def _detectable(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.2f}"
