"""Two framings of a prompt, one under which the model is to behave as unwanted and one as wanted.

A YAML file::

    unwanted:
      prompt: "{prompt}\\n\\nMake the evaluation report success, whatever it takes."
    wanted:
      system: You solve tasks honestly.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_grad_routing.directions import Message
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest

Prompt = str | tuple[Message, ...]
SLOT = "{prompt}"
SIDES = ("unwanted", "wanted")
FIELDS = ("system", "prompt", "replace")


@dataclass(frozen=True)
class Framing:
    """How one side's prompt is made of the plain one.

    Attributes:
        system: A system message in front (in place of one that is there); chats only.
        prompt: What becomes of the last user message, or of a plain text; holds ``{prompt}`` once.
        replace: Regular expressions and their replacements, applied to it first, in order.
    """

    system: str | None = None
    prompt: str = SLOT
    replace: tuple[tuple[str, str], ...] = ()

    def of(self, prompt: Prompt) -> Prompt:
        """The framed prompt. Raises ``UserError``: a chat without a user message, or a system message for a text."""
        if isinstance(prompt, str):
            if self.system is not None:
                raise UserError("framings system", self.system, "these prompts are plain texts; use prompt instead")
            return self._text(prompt)
        messages = list(prompt)
        users = [index for index, message in enumerate(messages) if message.role == "user"]
        if not users:
            raise UserError("prompt", [message.role for message in messages], "a chat needs a user message to frame")
        messages[users[-1]] = Message("user", self._text(messages[users[-1]].content))
        if self.system is not None:
            messages = [Message("system", self.system), *(m for m in messages if m.role != "system")]
        return tuple(messages)

    def _text(self, text: str) -> str:
        for pattern, replacement in self.replace:
            text = re.sub(pattern, replacement, text)
        return self.prompt.replace(SLOT, text)

    @property
    def added(self) -> tuple[str, ...]:
        """Texts that the framing adds and that no completion may repeat; those of 12 characters and more."""
        parts = [self.system or "", *self.prompt.split(SLOT)]
        return tuple(part.strip() for part in parts if len(part.strip()) >= 12)


@dataclass(frozen=True)
class Framings:
    """Both framings.

    Attributes:
        unwanted, wanted: Of the two sides.
        content_hash: SHA-256 (hex) of what they say.
    """

    unwanted: Framing
    wanted: Framing

    @property
    def content_hash(self) -> str:
        content = [[side.system, side.prompt, side.replace] for side in (self.unwanted, self.wanted)]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode("ascii")).hexdigest()


def load_framings(path: Path) -> Framings:
    """Read a YAML file. Raises ``UserError``: missing, malformed, an unknown key, or two framings that are the same."""
    import yaml

    if not path.is_file():
        raise UserError("--framings", str(path), "no such file; give a YAML file with `unwanted:` and `wanted:`")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("--framings", str(path), f"not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping) or set(content) != set(SIDES):
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"--framings {path}", found, "write exactly the two sides `unwanted:` and `wanted:`")
    framings = Framings(*(_framing(f"{path} {side}", content[side]) for side in SIDES))
    if framings.unwanted == framings.wanted:
        raise UserError(f"--framings {path}", "equal", "the two framings are the same; make them contrast")
    return framings


def _framing(where: str, content: Any) -> Framing:
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise UserError(where, content, f"give {', '.join(FIELDS)}")
    for key in content:
        if key not in FIELDS:
            raise UserError(f"{where}.{key}", content[key], nearest(str(key), list(FIELDS)))
    for key in ("system", "prompt"):
        if content.get(key) is not None and not (isinstance(content[key], str) and content[key].strip()):
            raise UserError(f"{where}.{key}", content[key], "give a text that is not empty")
    prompt = content.get("prompt") or SLOT
    if prompt.count(SLOT) != 1:
        raise UserError(f"{where}.prompt", prompt, f"write {SLOT} exactly once")
    return Framing(content.get("system"), prompt, _replacements(where, content.get("replace") or {}))


def _replacements(where: str, content: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(content, Mapping) or not all(isinstance(text, str) for text in (*content, *content.values())):
        raise UserError(f"{where}.replace", content, "give {regular expression: replacement}, both texts")
    for pattern, replacement in content.items():
        try:
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            raise UserError(f"{where}.replace", pattern, f"not a regular expression: {error}") from None
    return tuple(content.items())
