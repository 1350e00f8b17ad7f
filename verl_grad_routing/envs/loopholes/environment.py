"""The registered environment: settings and the way to the builder. Standard library only."""

from __future__ import annotations

from pathlib import Path

from verl_grad_routing.envs.base import ENVIRONMENTS, Environment, Verdict
from verl_grad_routing.envs.loopholes.grader import grade
from verl_grad_routing.envs.loopholes.settings import LOOPHOLES, Settings
from verl_grad_routing.envs.loopholes.text import LoopholesWorld
from verl_grad_routing.envs.manifest import Manifest


@ENVIRONMENTS.register("loopholes")
class Loopholes(Environment):
    """Sort five letters, or take the loophole that every prompt shows; see the package's docstring."""

    loopholes = LOOPHOLES
    reward_function = "pkg://verl_grad_routing.envs.loopholes.reward"

    Config = Settings
    config: Settings

    @property
    def known(self) -> tuple[str, ...]:
        return (self.config.known,)

    @classmethod
    def describe(cls) -> str:
        return (
            "sort five letters or exploit the prompt's loophole (leak, sentinel, blank, wildcard); "
            "0.86M-parameter char-level Llama trained from scratch, a minute or two on two cores"
        )

    def prepare(self, to: Path, *, force: bool = False) -> Manifest:
        from verl_grad_routing.envs.chars.prepare import build

        return build(LoopholesWorld(self.config), to, force=force)

    def grade(self, completion: str, ground_truth: str) -> Verdict:
        return grade(completion, ground_truth)
