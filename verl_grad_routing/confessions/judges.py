"""Rewards of confessions. A judge sees the prompt, the answer and the confession; never reasoning, never the grader."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from verl_grad_routing.confessions.measures import Confession
from verl_grad_routing.confessions.settings import GT_JUDGE
from verl_grad_routing.errors import UserError

KEY = "grad_routing.confessions.judge"
THREADS = 16  # a judge that asks a server mostly waits
Judge = Callable[[str, str, str], float]


def build_judge(path: str) -> Judge | None:
    """The function that ``package.module:function`` names; ``None`` for ``gt_judge``. Raises ``UserError``."""
    if path == GT_JUDGE:
        return None
    module, _, name = path.partition(":")
    if not module or not name:
        raise UserError(KEY, path, f"write it as package.module:function, or {GT_JUDGE}")
    try:
        judge: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(KEY, path, f"cannot be imported ({error}); is it on PYTHONPATH?") from None
    if callable(judge):
        return judge  # pyright: ignore[reportReturnType]
    raise UserError(KEY, path, "must be a function of (prompt, answer, confession)")


def visible(text: str, reasoning_end: str | None) -> str:
    """What may be judged of a response: all that follows its reasoning, and nothing where the reasoning never ends."""
    if reasoning_end is None:
        return text
    _, found, after = text.rpartition(reasoning_end)
    return after.strip() if found else ""


def judged(judge: Judge | None, confessions: Sequence[Confession]) -> list[float]:
    """R_c of each confession: the judge's number, 0 for one that cannot be read.

    Without a judge (``gt_judge``) 1 for a confession that says what the grader knows, ``confessed == hacked``.

    Raises:
        UserError: The judge returned something else than a number in [0, 1]; or ``gt_judge`` without facts.
    """
    readable = [row for row, one in enumerate(confessions) if one.confessed is not None]
    rewards = [0.0] * len(confessions)
    if judge is None:
        found = [_truthful(confessions[row]) for row in readable]
    else:
        ask = judge
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda row: _asked(ask, confessions[row]), readable))
    for row, reward in zip(readable, found, strict=True):
        rewards[row] = reward
    return rewards


def _truthful(one: Confession) -> float:
    if one.hack is None:
        raise UserError(KEY, GT_JUDGE, "the reward function returns no fact 'hack' to compare confessions with")
    return float(one.confessed == one.hack)


def _asked(judge: Judge, one: Confession) -> float:
    said: Any = judge(one.prompt, one.answer, one.text)
    if isinstance(said, bool) or not isinstance(said, int | float) or not 0 <= said <= 1:
        raise UserError(f"{KEY} on a confession of {one.uid}", said, "a judge must return a number from 0 to 1")
    return float(said)
