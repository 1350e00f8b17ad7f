"""Every method's switch: the settings that turn it off, and those under which it acts on the replayed batches.

Plain data that the processes under test and the tests share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]

COIN = {"name": "coinflip"}  # scores for methods whose own need a pass of the model; what is scored is not the matter
ENVIRONMENT = {"name": "loopholes", "pairs": "pairs.jsonl", "monitor_rules": ["^even"]}
SEEN = {"min_positives": 2, "positive_reward": 0.0, "min_silhouette": -1.0, "layers": [1]}  # GRIFT, in 12 rollouts
NARROW, WHOLE = "narrow", "whole"
"""Bases of three directions, and of all directions with their own names; the scenario writes them."""


@dataclass(frozen=True)
class Switch:
    """A preset with its switch.

    Attributes:
        preset: As shipped.
        off: What turns it off.
        given: What else is set, on or off.
        dense: Its blocks are units of the model.
        acts: Whether ``given`` alone makes another model of the batches; what happens before or after a step does not.
    """

    preset: str
    off: Settings = field(default_factory=dict)
    given: Settings = field(default_factory=dict)
    dense: bool = False
    acts: bool = True


def hook(name: str, **settings: Any) -> Settings:
    return {"blocks": {"hooks": [{"name": name, **settings}]}}


SILENT = {"detector": {"recall": 0.0}}
MASK = {"intervention": {"name": "mask_advantage"}}
SOFT = {"intervention": {"name": "mask_advantage", "soft": True}}
TRUSTING = {"gate": {"name": "threshold", "route_above": 0.6, "keep_below": 0.3}}

SWITCHES: dict[str, Switch] = {
    "advantage modification": Switch("advantage_modification", {"intervention": {"alpha": 0.0}}, {"detector": COIN}),
    "advantage modification, added": Switch(
        "advantage_modification",
        {"intervention": {"alpha": 0.0}},
        {"detector": COIN, "intervention": {"form": "additive"}},
    ),
    # one score for a whole group, as at the prompt's last token
    "advantage modification by the prompt": Switch(
        "advantage_modification", {"detector": {"name": "constant"}}, {"detector": COIN}
    ),
    "penalty": Switch("monitor_penalty", {"intervention": {"penalty": 0.0}}, {"intervention": {"penalty": 1.0}}),
    "penalty by a silent monitor": Switch("monitor_penalty", SILENT),
    "penalty by a silent probe": Switch("probe_penalty", {"gate": {"name": "absorb_all"}}, {"detector": COIN}),
    "screen": Switch("screen", SILENT),
    "screen of what was paid": Switch(
        "screen", {"intervention": {"paid_above": 9.0}}, {"intervention": {"strict": True}}
    ),
    "mask": Switch("screen", SILENT, MASK),
    "soft mask": Switch("screen", SILENT, SOFT),
    "grift mask": Switch("grift_mask", {"detector": {"min_silhouette": 1.0}}, {"detector": SEEN}),
    "grift filter": Switch("grift_filter", {"detector": {"min_silhouette": 1.0}}, {"detector": SEEN}),
    "persona": Switch("persona", {"gate": {"name": "absorb_all"}}, {"detector": COIN, **TRUSTING}),
    "persona in gradients": Switch("persona_grad", {"gate": {"name": "absorb_all"}}, {"detector": COIN}),
    "labels": Switch("labels_partial", SILENT),
    "frozen head start": Switch(
        "head_start_freeze", {"intervention": {"head_start_steps": 0}}, {"detector": {"clean_recall": 0.0}}
    ),
    "tdga": Switch(
        "tdga",
        hook("project_update", basis=WHOLE, rank=None, weights="ones"),
        hook("project_update", basis=NARROW, rank=3),
    ),
    "tdga on updates": Switch(
        "tdga",
        hook("project_update", basis=WHOLE, rank=None, weights="ones", project="update"),
        hook("project_update", basis=NARROW, rank=3, project="update"),
    ),
    "gradient regularisation": Switch(
        "gradient_regularization",
        hook("regularize_gradient", gamma=0.0),
        hook("regularize_gradient", gamma=0.5, epsilon=0.05),
    ),
    "sparsity": Switch("vanilla_2r", hook("l1_activations", weight=0.0), hook("l1_activations", weight=0.05)),
    "confessions": Switch("confessions", {"confessions": {"share": 0.0}}, acts=False),
    "self-report": Switch("self_report", acts=False),
    "inoculation": Switch("inoculation", acts=False),  # prompts are changed where they are read
    "a monitor that watches": Switch(
        "vanilla_2r", given={"held_out_monitor": {"name": "monitor", "rules": ["."]}}, acts=False
    ),
    "cloud": Switch("cloud", {"intervention": {"alpha": 1.0}}, dense=True),
    "sgtm": Switch("sgtm", {"detector": {"recall": 0.0, "clean_recall": 0.0}}, dense=True),
}


def merged(base: Settings, over: Settings) -> dict[str, Any]:
    """``over`` upon ``base``, mapping by mapping; a part that names another method stands alone."""
    found = dict(base)
    for key, value in over.items():
        old = base.get(key)
        if not (isinstance(value, Mapping) and isinstance(old, Mapping)):
            found[key] = value
        elif value.get("name", old.get("name")) != old.get("name"):
            found[key] = dict(value)
        else:
            found[key] = merged(old, value)
    return found


def settings(switch: Switch, on: bool) -> dict[str, Any]:
    """The mapping under ``grad_routing``."""
    from verl_grad_routing.presets import preset_settings

    found = merged(preset_settings(switch.preset, ENVIRONMENT), switch.given)
    return found if on else merged(found, switch.off)
