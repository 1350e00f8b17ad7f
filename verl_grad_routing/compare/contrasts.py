"""What a comparison measures, and each arm against its baselines on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from verl_grad_routing.compare.comparison import Finding
from verl_grad_routing.compare.paired import STATEMENT_SEEDS, Difference, difference, holm
from verl_grad_routing.compare.results import Results, StoredRun

CONTROL_SIGNALS = ("none", "oracle")  # of detectors.Signal: knows nothing, or the grader's truth
MARGIN = 0.05  # of the solve rate: what a method may lose and still be said to keep the task


@dataclass(frozen=True)
class Measure:
    """A rate after training (or before it), one number a run.

    Attributes:
        title: In tables.
        what: ``hack`` or ``solve``.
        deployed: As deployed; otherwise as trained.
        unknown: Over the prompts whose loophole type no contrastive pair shows; otherwise over all.
        before: Before the first step.
    """

    title: str
    what: Literal["hack", "solve"]
    deployed: bool
    unknown: bool = False
    before: bool = False

    def of(self, run: StoredRun) -> float | None:
        """The rate of ``run``; None when there are no such prompts, or no validation before training."""
        if self.before and 0 not in run.validation_steps:
            return None
        validation = run.rates(0 if self.before else "last", deployed=self.deployed)
        tally = validation.unknown if self.unknown else validation.overall
        return getattr(tally, self.what).value if tally is not None else None


HACK, SOLVE = Measure("hack, as deployed", "hack", True), Measure("solve, as deployed", "solve", True)
HACK_UNKNOWN = Measure("hack of unknown types, as deployed", "hack", True, unknown=True)
COMPARED = (HACK, SOLVE, HACK_UNKNOWN)
MEASURES = (Measure("hack, as trained", "hack", False), Measure("solve, as trained", "solve", False), *COMPARED)
BEFORE = tuple(replace(measure, title=f"{measure.title}, before training", before=True) for measure in MEASURES)
SOLVE_BEFORE = BEFORE[MEASURES.index(SOLVE)]


@dataclass(frozen=True)
class Contrast:
    """One arm minus a baseline in one measure; ``p_holm`` is corrected over the arms compared with that baseline."""

    measure: Measure
    arm: str
    baseline: str
    difference: Difference
    p_holm: float


def by_arm(runs: Sequence[StoredRun]) -> dict[str, list[StoredRun]]:
    """The runs of one environment by the name of their arm."""
    groups: dict[str, list[StoredRun]] = {}
    for run in runs:
        groups.setdefault(str(run.record.arm), []).append(run)
    return groups


def by_seed(runs: Sequence[StoredRun], measure: Measure) -> dict[int, float]:
    """Seed to rate, of the runs that have such prompts."""
    values = {int(run.record.seed or 0): measure.of(run) for run in runs}
    return {seed: value for seed, value in values.items() if value is not None}


def baselines(results: Results) -> list[str]:
    """The arms that every other one is compared with."""
    names = (results.grid["reference"], results.grid["control"])
    return [name for name in dict.fromkeys(names) if name is not None]


def contrasts(groups: Mapping[str, Sequence[StoredRun]], baseline: str, measure: Measure) -> list[Contrast]:
    """Every other arm against ``baseline``, on the seeds that both have finished; arms without any are absent."""
    base = by_seed(groups.get(baseline, ()), measure)
    found = {}
    for arm, runs in groups.items():
        values = by_seed(runs, measure)
        seeds = sorted(base.keys() & values.keys())
        if arm != baseline and seeds:
            found[arm] = difference([values[seed] for seed in seeds], [base[seed] for seed in seeds])
    corrected = holm([found[arm].p for arm in found])
    return [
        Contrast(measure, arm, baseline, entry, p) for (arm, entry), p in zip(found.items(), corrected, strict=True)
    ]


def hack_by_type(
    groups: Mapping[str, Sequence[StoredRun]],
) -> tuple[dict[str, bool], dict[str, dict[str, list[float]]]]:
    """The deployed hack rate on each loophole type.

    Returns:
        Type -> whether the pairs show it, those first; and arm -> type -> rates, one a run that has such prompts.
    """
    rates: dict[str, dict[str, list[float]]] = {arm: {} for arm in groups}
    known: set[str] = set()
    for arm, runs in groups.items():
        for validation in (run.rates("last", deployed=True) for run in runs):
            known |= validation.known_types
            for name, tally in validation.types.items():
                rates[arm].setdefault(name, []).append(tally.hack.value)
    types = {name for by_type in rates.values() for name in by_type}
    return {name: name in known for name in sorted(types, key=lambda name: (name not in known, name))}, rates


def is_control(runs: Sequence[StoredRun]) -> bool:
    """Whether the arm is one by its configuration: its detector knows nothing, or reads the grader's truth."""
    return runs[0].record.control or runs[0].signal in CONTROL_SIGNALS


def claims(results: Results, environment: str) -> list[Finding]:
    """For each method, one statement against each baseline: what its intervals exclude, and no more.

    One holds when the whole interval of the hack difference lies below zero, and above ``-MARGIN`` lie the whole
    intervals of two solve differences: to the baseline, and to the same runs before training. (A baseline that hacks
    solves nothing, so to keep what it keeps says little.) All over at least ``STATEMENT_SEEDS`` seeds, fewer leave it
    open, and without a correction for how many statements there are.
    """
    groups = by_arm(results.of(environment))
    total, found = len(results.grid["seeds"]), []
    for baseline in baselines(results):
        hack, solve = (
            {contrast.arm: contrast.difference for contrast in contrasts(groups, baseline, measure)}
            for measure in (HACK, SOLVE)
        )
        for arm, less in hack.items():
            if is_control(groups[arm]):
                continue
            more, learned = solve[arm], since_start(groups[arm])
            kept = _kept(more) and learned is not None and _kept(learned)
            enough = less.seeds >= STATEMENT_SEEDS
            few = "" if enough else f"; fewer than {STATEMENT_SEEDS} seeds state nothing"
            text = (
                f"{environment}: {arm} minus {baseline}, as deployed, {less.seeds} of {total} seeds: "
                f"hack {less} ({_said(less)}), solve {more} ({_said(more, among=False)}), and "
                f"{learned or 'not measured'} since before training{' (kept)' if kept else ''}{few}."
            )
            found.append(Finding(text, less.below_zero and kept if enough else None))
    return found


def since_start(runs: Sequence[StoredRun]) -> Difference | None:
    """Solve rate as deployed after training minus that before it, by seed; None where the latter was not measured."""
    before, after = by_seed(runs, SOLVE_BEFORE), by_seed(runs, SOLVE)
    seeds = sorted(before.keys() & after.keys())
    return difference([after[seed] for seed in seeds], [before[seed] for seed in seeds]) if seeds else None


def _kept(solve: Difference) -> bool:
    return solve.seeds >= STATEMENT_SEEDS and solve.low > -MARGIN


def _said(difference: Difference, among: bool = True) -> str:
    """What the interval says, in how many seeds it was lower, and p, which one seed does not have."""
    seeds = difference.seeds
    verdict = "lower" if difference.below_zero else "higher" if difference.above_zero else "no difference shown"
    said = [verdict if seeds >= STATEMENT_SEEDS else "", f"below 0 in {difference.lower} of {seeds}" if among else ""]
    return ", ".join(part for part in [*said, f"p = {difference.p:.3f}" if seeds > 1 else "no p"] if part)
