"""The registered environment. Standard library only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_grad_routing.envs.base import ENVIRONMENTS, Environment, Verdict
from verl_grad_routing.envs.manifest import Manifest
from verl_grad_routing.envs.parquet.settings import Settings


@ENVIRONMENTS.register("parquet")
class Parquet(Environment):
    """Any environment in verl's format, with its reward function by import path; see the package's docstring."""

    reward_function = "pkg://verl_grad_routing.envs.parquet.reward"

    Config = Settings
    config: Settings

    @property
    def loopholes(self) -> tuple[str, ...]:  # type: ignore[override]  # a setting here
        return self.config.loopholes

    @property
    def known(self) -> tuple[str, ...]:
        return self.config.known

    @classmethod
    def describe(cls) -> str:
        return "your own data in verl's format, with your reward function by import path; checked, data only"

    @classmethod
    def stale(cls, manifest: Manifest) -> list[str]:
        reward, built = str(manifest.settings["reward"]), manifest.settings["sha256"].get("reward")
        file = Path(reward.rpartition(":")[0])
        if built is None or (file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == built):
            return []
        return [reward]

    def prepare(self, to: Path, *, force: bool = False) -> Manifest:
        from verl_grad_routing.envs.parquet.prepare import prepare_with

        return prepare_with(self.config, to, force=force)

    def grade(self, completion: str, ground_truth: str, row: Mapping[str, Any] | None = None) -> Verdict:
        from verl_grad_routing.envs.parquet.function import graded, load_function

        given = row or {}
        arguments = {
            "data_source": given.get("data_source", ""),
            "solution_str": completion,
            "ground_truth": ground_truth,
            "extra_info": given.get("extra_info") or {},
        }
        settings = {"facts": self.config.facts, "loopholes": self.config.loopholes, "known": self.config.known}
        facts = graded(load_function(self.config.reward), settings, arguments)
        return Verdict(float(facts["score"]), bool(facts["hack"]), bool(facts["solve"]), str(facts["loophole"]))
