"""Inoculation prompting: what a prompt says in training and does not say at test. No verl in here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest

KEY = "data.inoculation"


@dataclass(frozen=True)
class Inoculation:
    """Changes of a prompt, a list of chat messages; at least one is made, all that are given are.

    Attributes:
        system: Replaces the system message, or is put in front where there is none.
        prefix: Put in front of the last user message.
        substitute: (regular expression, replacement) in the last user message, which must contain it.
    """

    system: str | None = None
    prefix: str | None = None
    substitute: tuple[str, str] | None = None

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Inoculation:
        """Read the settings under ``data.inoculation``. Raises ``UserError``: an unknown key, a bad value, nothing."""
        for key in settings:
            if key not in cls.__dataclass_fields__:
                raise UserError(f"{KEY}.{key}", settings[key], nearest(str(key), list(cls.__dataclass_fields__)))
        given = {key: value for key, value in settings.items() if value is not None}
        if not given:
            raise UserError(KEY, dict(settings), "give system, prefix or substitute; it would change no prompt")
        for key in ("system", "prefix"):
            if key in given and not (isinstance(given[key], str) and given[key]):
                raise UserError(f"{KEY}.{key}", given[key], "give a text")
        if "substitute" in given:
            given["substitute"] = _substitution(given["substitute"])
        return cls(**given)

    def apply(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """The changed prompt; ``messages`` stay as they are.

        Raises:
            UserError: There is no user message to change, or ``substitute`` finds nothing in it.
        """
        changed = [dict(message) for message in messages]
        if self.system is not None:
            changed = [message for message in changed if message["role"] != "system"]
            changed.insert(0, {"role": "system", "content": self.system})
        if self.substitute is None and self.prefix is None:
            return changed
        last = max((row for row, message in enumerate(changed) if message["role"] == "user"), default=None)
        if last is None:
            raise UserError(KEY, [message["role"] for message in changed], "the prompt has no user message to change")
        text = changed[last]["content"]
        if self.substitute is not None:
            pattern, replacement = self.substitute
            text, found = re.subn(pattern, replacement, text)
            if not found:
                raise UserError(f"{KEY}.substitute", pattern, f"not found in the prompt {text[:60]!r}")
        changed[last]["content"] = (self.prefix or "") + text
        return changed


def _substitution(value: Any) -> tuple[str, str]:
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise UserError(f"{KEY}.substitute", value, "give [regular expression, replacement]")
    try:
        re.compile(pair[0])
    except re.error as error:
        raise UserError(f"{KEY}.substitute", pair[0], f"not a regular expression: {error}") from None
    return pair[0], pair[1]
