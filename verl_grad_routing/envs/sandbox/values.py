"""Values that come out of the sandbox: decoded strictly, compared exactly. Standard library only.

A value is None, a bool, an int, a float, a str, a list of values, or a dict from str to values; nothing else can be
written, so no object of the candidate's, with methods of its own, ever reaches the comparison.

Two values are the same when their types are (a bool is no int, an int no bool, a list no tuple) and their contents. One
rule is softer: where a float is expected, a float within 1e-9 or one millionth of it, whichever is more, is the same,
and so is an int of exactly its value.
"""

from __future__ import annotations

import json
import math
from typing import Any

RELATIVE, ABSOLUTE = 1e-6, 1e-9
DIGITS = 1000


class Invalid(ValueError):
    """Not a value, or not one that is accepted."""


def decode(data: bytes) -> Any:
    """Decode JSON text, refusing what JSON's own grammar or Python's reader would let pass.

    Raises:
        Invalid: Not UTF-8, not JSON, nested too deeply, a number that is not finite or has over ``DIGITS`` digits, a
            key that occurs twice.
    """
    try:
        text = data.decode("utf-8")
        return json.loads(
            text,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{type(error).__name__}: {str(error)[:100]}") from None


def same(expected: Any, actual: Any) -> bool:
    """Is ``actual``, decoded, what was expected? Recursion follows ``expected``, which is ours."""
    if type(expected) is float and type(actual) in (float, int):
        return _close(expected, actual)
    if type(expected) is not type(actual):
        return False
    if type(expected) is list:
        return len(expected) == len(actual) and all(map(same, expected, actual))
    if type(expected) is dict:
        return expected.keys() == actual.keys() and all(same(expected[key], actual[key]) for key in expected)
    return expected == actual


def _close(expected: float, actual: float | int) -> bool:
    if type(actual) is int:
        return expected == actual
    return math.isfinite(actual) and abs(expected - actual) <= max(ABSOLUTE, RELATIVE * abs(expected))


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise Invalid(f"an integer of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Invalid("a number that is not finite")
    return value


def _refuse(text: str) -> Any:
    raise Invalid(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Invalid("a key that occurs twice")
    return made
