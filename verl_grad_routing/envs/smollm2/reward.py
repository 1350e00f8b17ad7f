"""verl's custom reward function. Standard library only: verl imports it in every reward worker.

reward.custom_reward_function.path=pkg://verl_grad_routing.envs.smollm2.reward
reward.custom_reward_function.name=compute_score
"""

from __future__ import annotations

from typing import Any

from verl_grad_routing.envs.chars.grading import reward_facts
from verl_grad_routing.envs.smollm2.grader import grade, read_ground_truth


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float | str]:
    """Proxy reward and grader facts of one rollout; see ``reward_facts``."""
    truth = read_ground_truth(ground_truth)
    return reward_facts(grade(solution_str, truth), truth)
