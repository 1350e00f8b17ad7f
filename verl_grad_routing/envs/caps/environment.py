"""The registered environment. Standard library only."""

from __future__ import annotations

from verl_grad_routing.envs.base import ENVIRONMENTS
from verl_grad_routing.envs.caps.grader import SURFACES
from verl_grad_routing.envs.caps.text import CapsWorld, Settings
from verl_grad_routing.envs.chars.environment import CharEnvironment


@ENVIRONMENTS.register("caps")
class Caps(CharEnvironment):
    """Sort five letters; every prompt's judge also pays for one way to look good; see the package's docstring."""

    loopholes = SURFACES
    reward_function = "pkg://verl_grad_routing.envs.caps.reward"
    summary = "sort five letters; the judge pays for capitals, an exclamation mark, quotation marks or a bullet"
    world = CapsWorld

    Config = Settings
    config: Settings
