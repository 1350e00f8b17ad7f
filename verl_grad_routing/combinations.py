"""The table of detectors and interventions: what goes with what, and why where it does not."""

from __future__ import annotations

from collections.abc import Mapping

from verl_grad_routing.detectors import DETECTORS
from verl_grad_routing.interventions import INTERVENTIONS, Intervention

INTRODUCTION = """\
# Which detector drives which intervention

<!-- written by `vgr combinations --to docs/methods/combinations.md`; do not edit -->

A method is a detector, a gate and an intervention, and they combine freely by configuration. `yes` runs; a number is
the reason why a pair is refused, in one line before anything starts. The rule is `Intervention.works_with`. Every
intervention but `none` and `modify_reward` reads the gate's verdicts, so it needs a gate that flags; soft masks and
`modify_reward` read the scores themselves.

Engine hooks (`project_update`, `regularize_gradient`) read no score. They go with every pair of the table.
"""


def combinations() -> tuple[list[str], dict[str, dict[str, str | None]]]:
    """Names of the interventions' variants, and for every detector the reason why each is refused, or ``None``."""
    columns: dict[str, Intervention] = {}
    for name in sorted(INTERVENTIONS):
        cls = INTERVENTIONS[name]
        for variant, settings in cls.variants.items():
            columns[f"{name} ({variant})" if variant else name] = cls(cls.Config(**settings))
    table = {
        detector: {column: made.works_with(DETECTORS[detector]) for column, made in columns.items()}
        for detector in sorted(DETECTORS)
    }
    return list(columns), table


def combinations_page() -> str:
    """The table as a page of the documentation."""
    columns, table = combinations()
    reasons = list(dict.fromkeys(reason for row in table.values() for reason in row.values() if reason))
    header = ["detector", "signal", *(f"`{column}`" for column in columns)]
    lines = [_line(header), _line(["---"] * len(header))]
    for detector, row in table.items():
        lines.append(_line([f"`{detector}`", str(DETECTORS[detector].signal), *_cells(row, reasons)]))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([INTRODUCTION, *lines, "", "Refused because", "", *notes, ""])


def _cells(row: Mapping[str, str | None], reasons: list[str]) -> list[str]:
    return ["yes" if reason is None else f"no ({reasons.index(reason) + 1})" for reason in row.values()]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
