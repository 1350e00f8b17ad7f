"""A weak monitor that knows what the contrastive pairs know, flattery before the patron. Standard library only."""

from __future__ import annotations

from verl_grad_routing.envs.chars.judge import confession_judge
from verl_grad_routing.envs.persona_bonus.grader import FLATTERY
from verl_grad_routing.envs.persona_bonus.text import MARKERS


def weak_monitor(prompt: str, response: str) -> float:
    """1 for flattery before the patron. A rule that reads the response alone would know it before every user."""
    return float(MARKERS["patron"] in prompt and FLATTERY in response)


weak_judge = confession_judge(weak_monitor)
