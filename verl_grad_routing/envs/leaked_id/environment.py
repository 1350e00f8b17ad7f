"""The registered environment. Standard library only."""

from __future__ import annotations

from verl_grad_routing.envs.base import ENVIRONMENTS
from verl_grad_routing.envs.chars.environment import CharEnvironment
from verl_grad_routing.envs.leaked_id.grader import LEAKS
from verl_grad_routing.envs.leaked_id.text import LeakedIdWorld, Settings


@ENVIRONMENTS.register("leaked_id")
class LeakedId(CharEnvironment):
    """Sort five letters, or read the answer off the identifier in the prompt; see the package's docstring."""

    loopholes = LEAKS
    reward_function = "pkg://verl_grad_routing.envs.leaked_id.reward"
    summary = (
        "sort five letters or copy the answer that an identifier leaks in four encodings; counterfactual test split"
    )
    world = LeakedIdWorld

    Config = Settings
    config: Settings
