"""``vgr prepare``: an environment's settings from a YAML file and from the command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from verl_grad_routing.errors import UserError

EXAMPLE = "write key=value, the value as in YAML, e.g. --set hard=true"


def read_settings(file: Path | None, given: Iterable[str]) -> dict[str, Any]:
    """Settings from ``file`` (a YAML mapping, or ``None``), overridden by ``given`` (``key=value``).

    Raises:
        UserError: No such file, no mapping in it, or a setting that is no ``key=value``.
    """
    settings = {} if file is None else _read(file)
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError("--set", text, EXAMPLE)
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {key}", value, EXAMPLE) from None
    return settings


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError("--settings", str(file), "no such file")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(str(file), " ".join(str(error).split()), "write it as YAML, in UTF-8") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError("--settings", str(file), "write a mapping of settings: one `key: value` a line")
    return found
