"""The no-cheat scorecard: one row a method, from its card, its presets and the runs that are given.

Costs are whole steps without generation, of the method's main arm against ``vanilla_2r`` on the same environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from verl_grad_routing.cards import MethodCard, card_of, check_cards, controls, method_cards
from verl_grad_routing.compare.costs import REFERENCE, WARM_UP, cost
from verl_grad_routing.compare.results import is_results, load_results
from verl_grad_routing.compare.runs import Run, load_run
from verl_grad_routing.errors import UserError

NOT_MEASURED = "not measured"
HEADER = (
    "method",
    "presets",
    "train-time signal",
    "hack oracle assumed",
    "at deployment",
    "unknown hacks",
    f"cost against `{REFERENCE}`",
)
INTRODUCTION = """\
# Scorecard

<!-- written by `vgr scorecard [RESULTS]... --to docs/methods/scorecard.md`; do not edit -->

What each method reads in training, whether that amounts to a hack oracle, and what happens afterwards. The rows come
from `verl_grad_routing/cards`; that a card names every signal that its presets' detectors read is checked. What papers
report is not repeated here: see the [paper index](../paper_index.md).
"""
COSTS = f"""\
Cost is the median time of a step without generation, the first {WARM_UP} left out, divided by that of `{REFERENCE}`
on the same environment and seed: the median over seeds.
"""


def scorecard_page(runs: Sequence[Path | str] = ()) -> str:
    """The scorecard as a page of the documentation.

    Args:
        runs: Results folders of ``vgr compare``, or run folders, for the costs.

    Raises:
        UserError: A preset without an entry, a card that leaves out a signal, or folders that hold no runs.
    """
    check_cards()
    costs = measured_costs(runs)
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    lines += [_line(_row(card, costs.get(name))) for name, card in method_cards().items()]
    notes = [f"- `{preset}`: {reason}" for preset, reason in sorted(controls().items())]
    return "\n".join([INTRODUCTION, *lines, "", COSTS, "Presets that are controls, and of what:", "", *notes, ""])


def measured_costs(runs: Sequence[Path | str]) -> dict[str, str]:
    """By method: the ratio of its main preset's steps to the reference's, where there are runs of both."""
    groups: dict[tuple[str | None, str], list[Run]] = {}
    for run in (one for folder in runs for one in _loaded(Path(folder))):
        groups.setdefault((run.record.environment, run.record.preset), []).append(run)
    found: dict[str, str] = {}
    for (environment, preset), own in groups.items():
        measured = cost(own, groups.get((environment, REFERENCE), []))
        method = None if preset in controls() else card_of(preset)
        if method is None or measured is None or preset != method_cards()[method].shipped[0]:
            continue
        ratio = f"{environment}: {measured}" if environment else str(measured)
        found[method] = f"{found[method]}, {ratio}" if method in found else ratio
    return found


def _loaded(folder: Path) -> Sequence[Run]:
    if not folder.is_dir():
        raise UserError("RUNS", str(folder), "no such folder; give results of vgr compare, or run folders")
    return load_results(folder, allow_mixed_versions=True).runs if is_results(folder) else [load_run(folder)]


def _row(card: MethodCard, cost: str | None) -> list[str]:
    presets = ", ".join(f"`{name}`" for name in card.shipped) or "none yet"
    name = f"{card.title} ({card.source})"
    return [name, presets, card.signal, card.assumed, card.deployment, card.unknown_hacks, cost or NOT_MEASURED]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
