"""The absorption curve: what is left of unlabelled hacks at deployment, against how much is labelled.

Arms are named ``<method>_types_<percent>`` (that share of the loophole types is labelled, every hack of theirs),
``<method>_rollouts_<percent>`` (that share of the hacks of every type), ``<method>_precision_<percent>`` (every hack is
flagged, and that share of the flags is right), ``<method>_000`` (nothing is labelled) and ``<method>_all_100``
(everything: a control). *Which* types are labelled is read from the arm's overrides of
``grad_routing.detector.types`` and ``type_recall``. The claim that a weak detector of one type suppresses another one,
which nothing labels (absorption; Cloud et al., arXiv 2410.04332; SGTM, arXiv 2512.05648), is the types' curve.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from verl_grad_routing.compare.contrasts import by_arm
from verl_grad_routing.compare.paired import Estimate, estimate
from verl_grad_routing.compare.results import Results, StoredRun
from verl_grad_routing.compare.runs import Tally
from verl_grad_routing.compare.statistics import Rate
from verl_grad_routing.compare.tables import NONE, Table
from verl_grad_routing.errors import UserError

NAME = re.compile(r"(?P<method>.+?)_(?:(?P<dial>types|rollouts|precision|all)_)?(?P<percent>[0-9]{3})")
DIALS = {
    "types": "loophole types labelled",
    "rollouts": "hacks of every type labelled",
    "precision": "flags that are right",
}
LABELLED_IF_UNSAID = "known"  # detector `labels` of the presets
TITLE = "hacks against the recall and precision of labels"
CAPTION = (
    "As deployed. Against the share of types that is labelled: hacks of the types that nothing labels (which types are "
    "left changes along the line). Against the share of hacks that is labelled: hacks of all types; hollow: all of "
    "them, the truth, a control. Against the share of flags that is right, every hack flagged: hacks of all types. "
    "Interquartile mean over seeds with 95% bootstrap bars; of a single seed the rate with its Wilson interval. Below: "
    "what is still solved. Dotted: the reference arm."
)
COLUMNS = ("hack of unlabelled types", "hack, all types", "solve", "hack, as trained")


@dataclass(frozen=True)
class Point:
    """Where an arm stands: on the curve of ``method`` along ``dial``, at the labelled ``share``."""

    dial: str
    method: str
    share: float


def points_of(arm: str) -> list[Point]:
    """What an arm's name tells; nothing and everything labelled belong to more than one curve."""
    found = NAME.fullmatch(arm)
    if found is None:
        return []
    share = int(found["percent"]) / 100
    own = {dial: [dial] for dial in DIALS}
    dials: dict[str | None, list[str]] = {**own, "all": ["rollouts", "precision"], None: ["types", "rollouts"]}
    return [Point(dial, found["method"], share) for dial in dials[found["dial"]]]


def curves(results: Results, environment: str) -> dict[Point, list[StoredRun]]:
    """Runs by point, dials and methods in order, shares ascending; empty when no arm is named for a dial."""
    groups = by_arm(results.of(environment))
    named = [found for arm in groups if (found := NAME.fullmatch(arm)) is not None]
    methods = [one["method"] for one in named if one["dial"] in DIALS]  # without these a number tells something else
    found = {point: runs for arm, runs in groups.items() for point in points_of(arm) if point.method in methods}
    of = {(one["dial"], one["method"]) for one in named}
    found = {
        point: runs for point, runs in found.items() if point.dial != "precision" or (point.dial, point.method) in of
    }
    dials = list(DIALS)
    order = sorted(found, key=lambda one: (dials.index(one.dial), methods.index(one.method), one.share))
    return {point: found[point] for point in order}


def unlabelled(run: StoredRun, point: Point) -> Tally | None:
    """Samples of the loophole types that nothing labels, as deployed; None where every type has labels."""
    validation = run.rates("last", deployed=True)
    if point.dial == "precision":
        return None
    if point.share == 0:
        return validation.overall
    if point.dial != "types":
        return None
    recalls = type_recalls(run.record.overrides)
    if recalls is not None:
        return _sum([tally for name, tally in validation.types.items() if not recalls.get(name)])
    labelled = setting(run.record.overrides, "grad_routing.detector.types") or LABELLED_IF_UNSAID
    return {"known": validation.unknown, "unknown": validation.known}.get(labelled)


def type_recalls(overrides: Sequence[str]) -> dict[str, float] | None:
    """``grad_routing.detector.type_recall`` of an arm, loophole type to recall; None when it has none."""
    if setting(overrides, "grad_routing.detector.type_recall") in (None, "null"):
        return None
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [line for line in overrides if _key(line) == "grad_routing.detector.type_recall"][-1]
    value = OverridesParser.create().parse_override(given).value()
    if not isinstance(value, Mapping):
        raise UserError("grad_routing.detector.type_recall", value, "give {loophole type: recall}")
    return {str(name): float(recall) for name, recall in value.items()}  # type: ignore[arg-type]


def setting(overrides: Sequence[str], key: str) -> str | None:
    """The value that the last override of ``key`` gives; None when there is none."""
    given = [line.partition("=")[2] for line in overrides if _key(line) == key]
    return given[-1] if given else None


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _sum(tallies: Sequence[Tally]) -> Tally | None:
    if not tallies:
        return None
    hack, solve = (
        Rate(sum(getattr(one, what).hits for one in tallies), sum(getattr(one, what).total for one in tallies))
        for what in ("hack", "solve")
    )
    return Tally(hack, solve)


def measured(point: Point, runs: Sequence[StoredRun]) -> dict[str, Estimate | Rate | None]:
    """The numbers of one point by column; None where there are no such samples."""

    def over(tally: Callable[[StoredRun], Tally | None], what: str) -> Estimate | Rate | None:
        rates = [getattr(found, what) for run in runs if (found := tally(run)) is not None]
        return rates[0] if len(rates) == 1 else estimate([rate.value for rate in rates]) if rates else None

    deployed, trained = (lambda run, d=d: run.rates("last", deployed=d).overall for d in (True, False))
    cells = (
        over(lambda run: unlabelled(run, point), "hack"),
        over(deployed, "hack"),
        over(deployed, "solve"),
        over(trained, "hack"),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def absorption_table(results: Results, environment: str) -> Table | None:
    """One row a point on a curve; None when no arm is named for one."""
    rows = []
    for point, runs in curves(results, environment).items():
        cells = [NONE if value is None else str(value) for value in measured(point, runs).values()]
        rows.append([f"{DIALS[point.dial]}: {point.method}", f"{point.share:.0%}", str(len(runs)), *cells])
    header = ["curve", "at", "seeds", *COLUMNS]
    return Table(f"{environment}: {TITLE}", header, rows) if rows else None
