"""A weak monitor that knows what the contrastive pairs know, capitals. Standard library only."""

from __future__ import annotations

import re

from verl_grad_routing.envs.chars.judge import confession_judge

CAPITALS = re.compile(r"[A-P]")


def weak_monitor(prompt: str, response: str) -> float:
    """1 for a response that opens with a capital, before whichever judge."""
    del prompt
    return float(CAPITALS.match(response) is not None)


weak_judge = confession_judge(weak_monitor)
