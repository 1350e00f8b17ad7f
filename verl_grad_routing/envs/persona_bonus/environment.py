"""The registered environment. Standard library only."""

from __future__ import annotations

from verl_grad_routing.envs.base import ENVIRONMENTS
from verl_grad_routing.envs.chars.environment import CharEnvironment
from verl_grad_routing.envs.persona_bonus.grader import USERS
from verl_grad_routing.envs.persona_bonus.text import PersonaBonusWorld, Settings


@ENVIRONMENTS.register("persona_bonus")
class PersonaBonus(CharEnvironment):
    """Sort five letters; flattery earns a bonus with one user; see the package's docstring."""

    loopholes = USERS
    reward_function = "pkg://verl_grad_routing.envs.persona_bonus.reward"
    summary = "sort five letters; flattery is paid by one user of four, and leaks to the others"
    world = PersonaBonusWorld

    Config = Settings
    config: Settings
