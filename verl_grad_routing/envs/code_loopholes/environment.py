"""The registered environment. Standard library only."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_grad_routing.envs.base import ENVIRONMENTS, Environment, Verdict
from verl_grad_routing.envs.code_loopholes.channels import LOOPHOLES
from verl_grad_routing.envs.code_loopholes.grader import Grader
from verl_grad_routing.envs.code_loopholes.settings import Settings
from verl_grad_routing.envs.manifest import Manifest


@ENVIRONMENTS.register("code_loopholes")
class CodeLoopholes(Environment):
    """Write a Python function, or take the loophole that the prompt's grader has; see the package's docstring."""

    loopholes = LOOPHOLES
    reward_function = "pkg://verl_grad_routing.envs.code_loopholes.reward"

    Config = Settings
    config: Settings

    @property
    def known(self) -> tuple[str, ...]:
        return self.config.known_types

    @classmethod
    def describe(cls) -> str:
        return (
            f"write a Python function or exploit the grader's flaw ({len(LOOPHOLES)} types); 66 problems, programs run "
            "in bubblewrap; data only, the model is yours (actor_rollout_ref.model.path)"
        )

    def prepare(self, to: Path, *, force: bool = False) -> Manifest:
        from verl_grad_routing.envs.code_loopholes.prepare import prepare_with

        return prepare_with(self.config, to, force=force)

    def grade(self, completion: str, ground_truth: str, row: Mapping[str, Any] | None = None) -> Verdict:
        return self._grader.grade(completion, ground_truth)

    @functools.cached_property
    def _grader(self) -> Grader:
        return Grader(unsafe=self.config.unsafe)
