"""A reward function by import path, and its facts under our names. Standard library only."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from verl_grad_routing.envs.parquet.settings import NONE
from verl_grad_routing.errors import UserError

Facts = dict[str, float | str]


def load_function(reward: str) -> Callable[..., Any]:
    """The function that ``path.py:function`` or ``package.module:function`` names.

    Raises:
        UserError: No such file, module or function; a module that cannot be imported; a coroutine function.
    """
    where, colon, name = str(reward).rpartition(":")
    if not colon or not name or not where:
        raise UserError("reward", reward, "give path.py:function or package.module:function")
    module = _from_file(reward, Path(where).expanduser()) if where.endswith(".py") else _by_name(reward, where)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError("reward", reward, f"no function {name!r} in {where}")
    if inspect.iscoroutinefunction(function):
        raise UserError("reward", reward, "give a plain function: coroutines are not awaited here")
    return function


def graded(function: Callable[..., Any], settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> Facts:
    """Call the reward function and give its result our names, the same keys for every sample.

    Args:
        function: The reward function.
        settings: ``loopholes``, ``known`` and ``facts`` of the environment's settings.
        arguments: What verl calls the function with.

    Returns:
        ``score``, ``hack``, ``solve``, ``known`` as floats, and ``loophole``.

    Raises:
        UserError: The result is no mapping with ``score``, or a fact is missing or of another kind.
    """
    result = function(**arguments)
    if not isinstance(result, Mapping) or "score" not in result:
        raise UserError("reward", result, "return a mapping with the key score, and the facts beside it")
    row = arguments.get("extra_info") or {}
    facts: Facts = {"score": _number("score", result["score"])}
    for name, source in settings["facts"].items():
        value = _find(name, source, result, row)
        facts[name] = str(value) if name == "loophole" else _truth(f"facts.{name} ({source})", value)
    if facts["loophole"] not in (*settings["loopholes"], NONE):
        types = ", ".join((*settings["loopholes"], NONE))
        raise UserError("facts.loophole", facts["loophole"], f"not among the loophole types: {types}")
    facts["known"] = float(facts["loophole"] in settings["known"])
    return facts


def _find(name: str, source: str, result: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    head, dot, rest = source.partition(".")
    if head == "extra_info" and dot:
        found, there = row, rest
    else:
        found, there = result, source
    if there not in found:
        raise UserError(f"facts.{name}", source, f"not there; found: {', '.join(sorted(map(str, found))) or 'nothing'}")
    return found[there]


def _number(key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"reward {key}", value, "return a number") from None


def _truth(key: str, value: Any) -> float:
    number = _number(key, value)
    if number not in (0.0, 1.0):
        raise UserError(key, value, "a fact is 0 or 1, True or False")
    return number


def _from_file(reward: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError("reward", reward, f"no such file: {path}")
    # a name of its own for each file, registered as dataclasses and pickle want it
    name = f"vgr_reward_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises is the user's to mend
        del sys.modules[name]
        raise UserError("reward", reward, f"cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _by_name(reward: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError("reward", reward, f"cannot be imported: {error}") from None
