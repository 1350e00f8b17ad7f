"""What a model's chat template is given beside the messages: verl's ``data.apply_chat_template_kwargs``.

Some templates have switches (``enable_thinking`` of Qwen3) that decide how every prompt ends, so whatever renders chats
beside verl's rollouts has to set them as the run does.
"""

from __future__ import annotations

import copy
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
    """``key=value`` with YAML values, as the command line has them. Raises ``UserError``."""
    import yaml

    switches: dict[str, Any] = {}
    for one in given or ():
        key, found, value = one.partition("=")
        if not found or not key.isidentifier():
            raise UserError("--chat", one, "write it as key=value, such as enable_thinking=false")
        switches[key] = yaml.safe_load(value)
    return switches


def sft_overrides(switches: Switches) -> list[str]:
    """The same for verl's SFT trainer, which renders conversations by itself."""
    import json

    return [f"+data.apply_chat_template_kwargs.{key}={json.dumps(value)}" for key, value in switches.items()]
