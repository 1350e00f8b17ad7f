"""The registered environment. Standard library only."""

from __future__ import annotations

from verl_grad_routing.envs.base import ENVIRONMENTS
from verl_grad_routing.envs.chars.environment import CharEnvironment
from verl_grad_routing.envs.loopholes.settings import LOOPHOLES, Settings
from verl_grad_routing.envs.loopholes.text import LoopholesWorld


@ENVIRONMENTS.register("loopholes")
class Loopholes(CharEnvironment):
    """Sort five letters, or take the loophole that every prompt shows; see the package's docstring."""

    loopholes = LOOPHOLES
    reward_function = "pkg://verl_grad_routing.envs.loopholes.reward"
    summary = "sort five letters or exploit the prompt's loophole (leak, sentinel, blank, wildcard)"
    world = LoopholesWorld

    Config = Settings
    config: Settings
