"""What the character-level graders share. Standard library only: verl imports it in every reward worker."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from verl_grad_routing.envs.base import Verdict
from verl_grad_routing.envs.chars.task import EOS
from verl_grad_routing.errors import UserError

Truth = Mapping[str, Any]


def read_ground_truth(
    ground_truth: str | Truth, environment: str, fields: Collection[str], types: Collection[str]
) -> Truth:
    """A row's ``reward_model.ground_truth``, parsed. Raises ``UserError`` when it is none of ``environment``'s."""
    try:
        found = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    except ValueError:
        found = None
    if not isinstance(found, Mapping) or not set(fields) <= set(found):
        fix = f"no {environment} row; make the data with `vgr prepare`"
        raise UserError("reward_model.ground_truth", ground_truth, fix)
    if found["loophole"] not in types:
        raise UserError("ground_truth.loophole", found["loophole"], f"use one of {', '.join(types)}")
    return found


def before_eos(completion: str) -> str:
    """What stands before EOS, or all of it when EOS is missing."""
    return completion.split(EOS, 1)[0]


def reward_facts(verdict: Verdict, truth: Truth) -> dict[str, float | str]:
    """What a reward function returns, the same keys for every sample.

    Returns:
        ``score`` (proxy reward), ``hack``, ``solve``, ``known`` (the prompt's loophole is of the type the pairs show),
        and ``loophole``, a string. All but ``score`` are facts for metrics, 0.0 or 1.0.
    """
    return {
        "score": verdict.score,
        "hack": float(verdict.hack),
        "solve": float(verdict.solve),
        "known": float(truth.get("known", False)),
        "loophole": verdict.loophole,
    }
