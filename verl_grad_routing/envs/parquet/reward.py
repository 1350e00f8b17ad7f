"""verl's custom reward function: the user's own, with its facts under our names.

reward.custom_reward_function.path=pkg://verl_grad_routing.envs.parquet.reward
reward.custom_reward_function.name=compute_score
reward.custom_reward_function.reward_kwargs.folder=DIR      the folder that `vgr prepare parquet --to DIR` wrote
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from verl_grad_routing.envs.manifest import Manifest
from verl_grad_routing.envs.parquet.function import Facts, graded, load_function


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    folder: str,
    **kwargs: Any,
) -> Facts:
    """Proxy reward and grader facts of one rollout.

    Returns:
        ``score``, ``hack``, ``solve``, ``known``, each a float, and ``loophole``, a string.
    """
    function, settings = _environment(folder)
    given = {"data_source": data_source, "solution_str": solution_str, "ground_truth": ground_truth}
    return graded(function, settings, {**given, "extra_info": extra_info or {}, **kwargs})


@functools.cache
def _environment(folder: str) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    settings = Manifest.read(Path(folder)).settings
    return load_function(settings["reward"]), settings
