"""verl's custom reward function. Standard library only: verl imports it in every reward worker.

reward.custom_reward_function.path=pkg://verl_grad_routing.envs.loopholes.reward
reward.custom_reward_function.name=compute_score
"""

from __future__ import annotations

from typing import Any

from verl_grad_routing.envs.loopholes.grader import grade, read_ground_truth


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float | str]:
    """Proxy reward and grader facts of one rollout, the same keys for every sample.

    Returns:
        ``score`` (proxy reward), ``hack``, ``solve``, ``known`` (the prompt's loophole is of the type the pairs show),
        each 0.0 or 1.0, and ``loophole``, a string. All but ``score`` are facts for metrics.
    """
    truth = read_ground_truth(ground_truth)
    verdict = grade(solution_str, truth)
    return {
        "score": verdict.score,
        "hack": float(verdict.hack),
        "solve": float(verdict.solve),
        "known": float(truth.get("known", False)),
        "loophole": verdict.loophole,
    }
