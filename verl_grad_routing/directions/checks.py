"""Checks of single configuration values, shared by the configurations of detectors, gates and interventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from verl_grad_routing.errors import UserError


def require_number(field: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse anything but a finite number in ``[low, high]`` (booleans are no numbers)."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (ok and math.isfinite(value) and low <= value <= high):
        if low == -math.inf and high == math.inf:
            raise UserError(field, value, "give a finite number")
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise UserError(field, value, f"give a number {limits}")


def require_int(field: str, value: Any, low: int) -> None:
    """Refuse anything but an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(field, value, f"give an integer of at least {low}")


def require_bool(field: str, value: Any) -> None:
    """Refuse anything but a boolean (a string such as 'no' would be true)."""
    if not isinstance(value, bool):
        raise UserError(field, value, "give true or false")


def require_choice(field: str, value: Any, options: Sequence[str]) -> None:
    """Refuse anything that is not one of ``options``."""
    if value not in options:
        raise UserError(field, value, f"choose one of {', '.join(options)}")


def as_tuple(field: str, value: Any) -> tuple[Any, ...]:
    """A list from YAML as a tuple. Refuses strings and single values."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(field, value, "give a list")
    return tuple(value)
