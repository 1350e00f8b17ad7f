"""What a model's chat template is given beside the messages: verl's ``data.apply_chat_template_kwargs``.

Some templates have switches (``enable_thinking`` of Qwen3) that decide how every prompt ends, so whatever renders chats
beside verl's rollouts has to set them as the run does.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from verl_grad_routing.errors import UserError

Switches = Mapping[str, Any]


def with_switches(tokenizer: Any, switches: Switches | None) -> Any:
    """``tokenizer``, its chat template always given ``switches``; the very same object when there are none."""
    if not switches:
        return tokenizer
    bound = copy.copy(tokenizer)
    bound.apply_chat_template = partial(tokenizer.apply_chat_template, **switches)
    return bound


def load_tokenizer(folder: str | Path, switches: Switches | None = None) -> Any:
    """The tokenizer of a model's folder. Raises ``UserError``: its chat template has no such switch."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for name in switches or {}:
        if not re.search(rf"\b{name}\b", str(tokenizer.chat_template)):
            raise UserError("--chat", name, f"the chat template of {folder} does not read it")
    return with_switches(tokenizer, switches)


def parse_switches(given: Sequence[str] | None) -> dict[str, Any]:
    """``key=value`` of the command line, read as Hydra reads the run's. Raises ``UserError``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    switches: dict[str, Any] = {}
    for one in given or ():
        try:
            override = OverridesParser.create().parse_override(one)
            key, value = override.key_or_group, override.value()
        except HydraException:
            key, value = "", None
        value = getattr(value, "text", value)  # of a quoted string
        plain = isinstance(value, str | int | float | bool | None) and "\\" not in str(value)
        if not plain or not key.isidentifier() or not one.startswith(f"{key}="):
            raise UserError("--chat", one, "write it as key=value with a plain value, such as enable_thinking=false")
        switches[key] = value
    return switches


def sft_overrides(switches: Switches) -> list[str]:
    """The same as overrides of verl's SFT trainer."""
    return [f"+data.apply_chat_template_kwargs.{key}={_hydra(value)}" for key, value in switches.items()]


def described(switches: Switches | None) -> dict[str, str]:
    """For the origin of what was made with them: ``{"chat": JSON}``, nothing where there are none."""
    return {"chat": json.dumps(dict(switches), sort_keys=True)} if switches else {}


def _hydra(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower()
