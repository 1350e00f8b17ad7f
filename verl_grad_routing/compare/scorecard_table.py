"""What each arm of a comparison reads in training, whether that is a hack oracle, and what it costs: from its card."""

from __future__ import annotations

from verl_grad_routing.cards import TRUTH, card_of, controls, method_cards
from verl_grad_routing.compare.contrasts import by_arm
from verl_grad_routing.compare.costs import REFERENCE, cost_ratio
from verl_grad_routing.compare.results import Results
from verl_grad_routing.compare.tables import NONE, Table
from verl_grad_routing.detectors import DETECTORS
from verl_grad_routing.presets import preset_names, preset_settings

TITLE = "Scorecard"
HEADER = ("arm", "method", "train-time signal", "hack oracle assumed", "at deployment", "unknown hacks")


def scorecard_table(results: Results) -> Table:
    """One row an arm of the grid, finished or not; a preset of one's own has no card, and the row says so.

    Costs are given where ``vanilla_2r`` ran beside, a column an environment.
    """
    places = [place["name"] for place in results.grid["environments"]]
    groups = {place: by_arm(results.of(place)) for place in places}
    unrouted = {
        place: [run for runs in own.values() for run in runs if run.record.preset == REFERENCE]
        for place, own in groups.items()
    }
    rows = []
    for arm in results.grid["arms"]:
        ratios = [cost_ratio(groups[place].get(arm["name"], []), unrouted[place]) for place in places]
        cost = [NONE if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append([arm["name"], *_said_of(arm["preset"]), *cost])
    return Table(TITLE, [*HEADER, *(f"cost against {REFERENCE}, {place}" for place in places)], rows)


def _said_of(preset: str) -> list[str]:
    """The columns between an arm and its costs."""
    if preset in controls():
        signal = str(DETECTORS[preset_settings(preset)["detector"]["name"]].signal)
        assumed = "yes" if signal in TRUTH else "no"
        return [f"control: {controls()[preset]}", signal, assumed, NONE, NONE]
    method = card_of(preset) if preset in preset_names() else None
    if method is None:
        return [f"preset {preset}, which has no card", NONE, NONE, NONE, NONE]
    card = method_cards()[method]
    return [f"{card.title} ({card.source})", card.signal, card.assumed, card.deployment, card.unknown_hacks]
