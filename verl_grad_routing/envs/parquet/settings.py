"""Settings, checked. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest

FACTS = ("hack", "solve", "loophole")
NONE = "none"


@dataclass(frozen=True)
class Settings:
    """What an environment in verl's format is made of. Paths are relative to the working directory.

    Attributes:
        train: Data file for training.
        val: Data file for validation.
        test: Held-out data file; optional.
        reward: The reward function, ``path.py:function`` or ``package.module:function``, with verl's signature
            ``(data_source, solution_str, ground_truth, extra_info)``. It returns a mapping with ``score``.
        pairs: Contrastive pairs (see ``directions.pairs``); every tag of a pair names a known loophole type.
        loopholes: All loophole types; a row without one has the type ``none``.
        known: Those that the pairs show.
        facts: Where ``hack``, ``solve`` (0 or 1) and ``loophole`` (a type) are found: a key of what the reward
            function returns, or ``extra_info.<field>`` of the row. Each is its own name by default.
        trial: Call the reward function once, with an empty answer, before anything is written.
    """

    train: str = ""
    val: str = ""
    test: str | None = None
    reward: str = ""
    pairs: str = ""
    loopholes: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    trial: bool = True

    def __post_init__(self) -> None:
        for key in ("loopholes", "known"):
            object.__setattr__(self, key, _names(key, getattr(self, key)))
        if NONE in self.loopholes:
            raise UserError("loopholes", list(self.loopholes), f"drop {NONE!r}: it stands for a row without a loophole")
        for name in self.known:
            if name not in self.loopholes:
                raise UserError("known", name, nearest(name, list(self.loopholes)))
        if not isinstance(self.facts, Mapping):
            raise UserError("facts", self.facts, "write a mapping: hack, solve, loophole -> where each is found")
        for key, value in self.facts.items():
            if key not in FACTS:
                raise UserError(f"facts.{key}", value, nearest(str(key), list(FACTS)))
            if not isinstance(value, str) or not value:
                raise UserError(f"facts.{key}", value, "give a key of the reward's result, or extra_info.<field>")
        object.__setattr__(self, "facts", {**{name: name for name in FACTS}, **self.facts})

    @property
    def splits(self) -> dict[str, str]:
        """Data file of each split."""
        return {name: path for name in ("train", "val", "test") if (path := getattr(self, name)) is not None}

    def require_complete(self) -> None:
        """Refuse settings with a hole: without any, the environment can only be listed."""
        for key, fix in (
            ("train", "give the data file for training"),
            ("val", "give the data file for validation"),
            ("reward", "give path.py:function or package.module:function"),
            ("pairs", "give the contrastive pairs: path.jsonl[@tag,tag] or path.md#section[@tag,tag]"),
            ("loopholes", "name the loophole types"),
            ("known", "name the types that the pairs show"),
        ):
            if not getattr(self, key):
                raise UserError(key, getattr(self, key), fix)


def _names(key: str, value: Any) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise UserError(key, value, "give a list of names, each once")
    return names
