"""What every method is and needs, in words: one YAML file a method, beside the presets that are it.

``vgr scorecard`` prints them. A preset belongs to exactly one card, or to ``controls.yaml``, which says what it is a
control of; a preset in neither is an error, so no method ships without an entry. To add one, copy a file here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from omegaconf import OmegaConf

from verl_grad_routing.directions.checks import as_tuple, require_choice
from verl_grad_routing.errors import UserError
from verl_grad_routing.presets import preset_names
from verl_grad_routing.registry import build_config

CONTROLS = "controls"
ORACLE = ("no", "part", "yes")
TRUTH = ("labels", "oracle")  # signals that are the grader's


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """One method.

    Attributes:
        title: Its name in tables.
        source: The paper, or ``ours``.
        presets: Patterns of the presets that are this method, the main one first (``grift_*``).
        signals: What training reads, names of ``detectors.Signal``.
        signal: The same in words.
        oracle: Is a hack oracle assumed in training: no, part (truth about some of the rollouts) or yes.
        oracle_note: What there is to add; empty for nothing.
        deployment: What happens at deployment.
        unknown_hacks: How hacks are handled that the signal does not know.
    """

    title: str
    source: str
    presets: tuple[str, ...]
    signals: tuple[str, ...]
    signal: str
    oracle: str
    deployment: str
    unknown_hacks: str
    oracle_note: str = ""

    def __post_init__(self) -> None:
        from verl_grad_routing.detectors import Signal

        for field in ("presets", "signals"):
            object.__setattr__(self, field, as_tuple(field, getattr(self, field)))
        for signal in self.signals:
            require_choice("signals", signal, [str(known) for known in Signal])
        require_choice("oracle", self.oracle, ORACLE)

    @property
    def assumed(self) -> str:
        """``oracle`` with its note."""
        return self.oracle + (f"; {self.oracle_note}" if self.oracle_note else "")

    @property
    def shipped(self) -> list[str]:
        """The presets that match, in the order of the patterns."""
        found = [name for pattern in self.presets for name in fnmatch.filter(preset_names(), pattern)]
        return [name for name in dict.fromkeys(found) if name not in controls()]


@cache
def method_cards() -> dict[str, MethodCard]:
    """Every card by its method's name, in alphabetical order. Raises ``UserError`` for a damaged one."""
    files = sorted(resources.files("verl_grad_routing.cards").iterdir(), key=lambda file: file.name)
    names = [file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")]
    return {name: _card(name) for name in names if name != CONTROLS}


@cache
def controls() -> dict[str, str]:
    """Presets that are no method, and what each of them controls for."""
    return {str(name): str(reason) for name, reason in _read(CONTROLS).items()}


def card_of(preset: str) -> str | None:
    """The method that a preset is; ``None`` for a control. Raises ``UserError``: it has no entry, or several."""
    found = [name for name, card in method_cards().items() if preset in card.shipped]
    if len(found) + (preset in controls()) != 1:
        where = ", ".join([*found, *([CONTROLS] if preset in controls() else [])]) or "none"
        fix = "name it in the presets of one file of verl_grad_routing/cards, or in controls.yaml with what it is for"
        raise UserError(f"method cards of preset {preset}", where, fix)
    return found[0] if found else None


def check_cards() -> None:
    """Every preset has one entry, and no preset reads a signal that its card leaves out. Raises ``UserError``."""
    from verl_grad_routing.detectors import DETECTORS
    from verl_grad_routing.presets import preset_settings

    for preset in preset_names():
        method = card_of(preset)
        if method is None:
            continue
        settings, card = preset_settings(preset), method_cards()[method]
        name = settings["detector"]["name"]
        signal = str(DETECTORS[name].signal)
        told = f"preset {preset} reads {signal} (detector {name})"
        if signal not in (*card.signals, "none"):
            raise UserError(f"cards/{method}.yaml: signals", list(card.signals), f"{told}; add it, and say so in words")
        if signal in TRUTH and card.oracle == "no" and not card.oracle_note:
            fix = f"{told}; say part or yes, or what it amounts to in oracle_note"
            raise UserError(f"cards/{method}.yaml: oracle", card.oracle, fix)


def _card(name: str) -> MethodCard:
    where = f"cards/{name}.yaml"
    try:
        return build_config(MethodCard, _read(name), where)
    except TypeError as error:
        raise UserError(where, name, f"{error}; every field of cards.MethodCard without a default") from None


def _read(name: str) -> Mapping[str, Any]:
    text = resources.files("verl_grad_routing.cards").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    read: Any = OmegaConf.to_container(OmegaConf.create(text))
    return read
