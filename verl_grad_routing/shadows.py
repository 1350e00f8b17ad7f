"""Methods that score the rollouts of a run in shadow: which they are (``grad_routing.compare``), built and checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from verl_grad_routing.cards import method_cards
from verl_grad_routing.config import GradRoutingConfig, Methods, build_parts
from verl_grad_routing.errors import UserError
from verl_grad_routing.presets import preset_names, preset_settings
from verl_grad_routing.registry import nearest

KEY = "grad_routing.compare"
ARM = "arm"  # the run's own method, in metrics
PARTS = ("detector", "gate", "intervention")
KEYS = ("name", "preset", "control", *PARTS)


@dataclass(frozen=True)
class Shadow:
    """A method that is asked what it would do, and does nothing.

    Attributes:
        name: In metrics, tables and figures.
        settings: Of detector, gate and intervention, as they were built.
        methods: The parts, with a state of their own.
    """

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    methods: Methods


def build_shadows(config: GradRoutingConfig) -> list[Shadow]:
    """The shadows that ``config.compare`` names, in its order.

    An entry is the name of a preset (``advantage_modification``) or of a method whose first preset is meant
    (``grift``), or a mapping ``{name, preset, control, detector, gate, intervention}``: the parts are merged into those
    of the preset (``preset``, by default the one called ``name``), and stand alone where there is none.

    Raises:
        UserError: An unknown or doubled name, an unknown key, a part that cannot be built, a value that is missing, a
            method without verdicts on rollouts, or one that reads the grader's truth and does not say so.
    """
    if not isinstance(config.compare, list | tuple):
        raise UserError(KEY, config.compare, "give a list of names or mappings, as in [advantage_modification, random]")
    shadows: list[Shadow] = []
    for entry in config.compare:
        shadow = _built(entry, asdict(config.environment))
        if shadow.name in (ARM, *(other.name for other in shadows)):
            raise UserError(f"{KEY}.name", shadow.name, "the name is taken; give {name: another, preset: ...}")
        shadows.append(shadow)
    return shadows


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """Errors inside name the shadow that they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{KEY}.{name}: {error.key}", error.value, error.fix) from None


def _built(entry: Any, environment: Mapping[str, Any]) -> Shadow:
    given: Mapping[str, Any] = {"name": entry} if isinstance(entry, str) else entry
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise UserError(KEY, entry, "give a name, or a mapping with one of letters, digits, _, . and -")
    where = f"{KEY}.{name}"
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        raise UserError(f"{where}.{unknown[0]}", given[unknown[0]], nearest(unknown[0], list(KEYS)))
    parts, control = _parts(given, where, environment)
    for part, settings in parts.items():
        for key, value in settings.items():
            if value == "???":
                fix = f"this value is required: {{name: {name}, {part}: {{{key}: ...}}}}"
                raise UserError(f"{where}.{part}.{key}", value, fix)
    methods = build_parts(parts, control, where)
    if not methods.detector.tells_apart:
        fix = "it reaches no verdict on rollouts, so there is nothing to compare; leave it out"
        raise UserError(where, parts["detector"]["name"], fix)
    return Shadow(name, parts, methods)


def _parts(
    given: Mapping[str, Any], where: str, environment: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Settings of the three parts, and whether the entry is said to be a control."""
    preset = given.get("preset") or _preset_of(given["name"])
    settings: dict[str, Any] = {"gate": {"name": "absorb_all"}, "intervention": {"name": "none"}}
    if preset is not None:
        if preset not in preset_names():
            raise UserError(f"{where}.preset", preset, nearest(str(preset), preset_names()))
        settings = preset_settings(preset, environment)
    elif "detector" not in given:
        known = nearest(given["name"], sorted({*preset_names(), *method_cards()}))
        raise UserError(KEY, given["name"], f"no preset or method has this name, and no detector is given; {known}")
    parts = {part: _merged(settings.get(part, {}), given.get(part, {}), f"{where}.{part}") for part in PARTS}
    return parts, bool(given.get("control", settings.get("control", False)))


def _preset_of(name: str) -> str | None:
    """The preset called ``name``, or the first one of the method called so."""
    if name in preset_names():
        return name
    card = method_cards().get(name)
    return card.shipped[0] if card is not None and card.shipped else None


def _merged(base: Mapping[str, Any], given: Any, where: str) -> dict[str, Any]:
    """``given`` over ``base``; alone where it names another method."""
    if not isinstance(given, Mapping):
        raise UserError(where, given, "give a mapping: {name: ..., settings}")
    if given.get("name", base.get("name")) != base.get("name"):
        return dict(given)
    return {**base, **given}
