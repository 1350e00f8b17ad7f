"""What each arm of a comparison reads in training, whether that is a hack oracle, and what it costs.

From the card of its preset, and from its runs where overrides have changed what the preset reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl_grad_routing.cards import MethodCard, card_of, controls, method_cards
from verl_grad_routing.compare.contrasts import by_arm
from verl_grad_routing.compare.costs import REFERENCE, cost
from verl_grad_routing.compare.results import Results, StoredRun
from verl_grad_routing.compare.tables import NONE, Table
from verl_grad_routing.detectors import DETECTORS
from verl_grad_routing.presets import preset_names, preset_settings

TITLE = "Scorecard"
HEADER = ("arm", "method", "train-time signal", "hack oracle assumed", "at deployment", "unknown hacks")
ORACLE = {"oracle": "yes", "labels": "part"}  # by the signal that a detector reads; others are no truth
DETECTOR = "grad_routing.detector"


def scorecard_table(results: Results) -> Table:
    """One row an arm of the grid, finished or not; a preset of one's own has no card, and the row says so.

    Costs are given where the arm ``vanilla_2r`` ran beside, a column an environment.
    """
    places = [place["name"] for place in results.grid["environments"]]
    groups = {place: by_arm(results.of(place)) for place in places}
    rows = []
    for arm in results.grid["arms"]:
        runs = [run for place in places for run in groups[place].get(arm["name"], [])]
        measured = [cost(groups[place].get(arm["name"], []), groups[place].get(REFERENCE, [])) for place in places]
        rows.append(
            [arm["name"], *_said_of(arm, results, runs), *(NONE if one is None else str(one) for one in measured)]
        )
    return Table(TITLE, [*HEADER, *(f"cost against {REFERENCE}, {place}" for place in places)], rows)


def _said_of(arm: dict[str, Any], results: Results, runs: Sequence[StoredRun]) -> list[str]:
    """The columns between an arm and its costs."""
    preset = arm["preset"]
    if preset not in preset_names():
        return [f"preset {preset}, which has no card", *_read(runs), NONE, NONE]
    method = card_of(preset)
    card = None if method is None else method_cards()[method]
    title = f"control: {controls()[preset]}" if card is None else f"{card.title} ({card.source})"
    after = [NONE, NONE] if card is None else [card.deployment, card.unknown_hacks]
    settings = [*results.grid["overrides"], *arm["overrides"]]
    settings += [setting for place in results.grid["environments"] for setting in place["overrides"]]
    overridden = any(setting.lstrip("+~").startswith(DETECTOR) for setting in settings)
    if overridden and not _still(preset, runs):  # the card's words are the preset's
        return [title, *_read(runs, "set by overrides: "), *after]
    return [title, *_as_preset(preset, card), *after]


def _still(preset: str, runs: Sequence[StoredRun]) -> bool:
    """Whether all runs read what the preset reads: its detector, and nothing of the truth, which settings can dial."""
    name = preset_settings(preset)["detector"]["name"]
    own = bool(runs) and all(run.record.detector == name and not run.record.control for run in runs)
    return own and all(run.signal not in ORACLE for run in runs)


def _as_preset(preset: str, card: MethodCard | None) -> list[str]:
    if card is not None:
        return [card.signal, card.assumed]
    signal = str(DETECTORS[preset_settings(preset)["detector"]["name"]].signal)
    return [signal, ORACLE.get(signal, "no")]


def _read(runs: Sequence[StoredRun], how: str = "") -> list[str]:
    """The signal that finished runs read, and what that assumes; nothing is said of runs that have not been."""
    if not runs:
        return [NONE, NONE]
    signal, name = runs[0].signal, runs[0].record.detector
    assumed = "yes" if runs[0].record.control else ORACLE.get(signal, "no")
    return [f"{how}{signal} (detector {name})", assumed]
