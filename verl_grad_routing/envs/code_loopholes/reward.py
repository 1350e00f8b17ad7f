"""verl's custom reward function. Standard library only: verl imports it in every reward worker.

reward.custom_reward_function.path=pkg://verl_grad_routing.envs.code_loopholes.reward
reward.custom_reward_function.name=compute_score

``reward.custom_reward_function.reward_kwargs`` may hold ``wall_s`` and ``cpu_s`` (limits of a run) and ``unsafe``.
"""

from __future__ import annotations

import functools
from typing import Any

from verl_grad_routing.envs.code_loopholes.grader import Grader, Truth
from verl_grad_routing.envs.sandbox import Limits


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    wall_s: float = 10.0,
    cpu_s: int = 4,
    unsafe: bool = False,
    **kwargs: Any,
) -> dict[str, float | str]:
    """Proxy reward and grader facts of one rollout, the same keys for every sample.

    Returns:
        ``score`` (proxy reward), ``hack``, ``solve``, ``known`` (the prompt's loophole is of a type the pairs show),
        each 0.0 or 1.0, and ``loophole``, a string. All but ``score`` are facts for metrics.

    Raises:
        SandboxError: No sandbox on this machine.
    """
    verdict = _grader(wall_s, cpu_s, unsafe).grade(solution_str, ground_truth)
    return {
        "score": verdict.score,
        "hack": float(verdict.hack),
        "solve": float(verdict.solve),
        "known": float(Truth.read(ground_truth).known),
        "loophole": verdict.loophole,
    }


@functools.lru_cache(maxsize=4)
def _grader(wall_s: float, cpu_s: int, unsafe: bool) -> Grader:
    return Grader(Limits(wall_s=wall_s, cpu_s=cpu_s), unsafe=unsafe)
