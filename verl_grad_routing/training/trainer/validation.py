"""Validation of the model as trained and as it will be deployed."""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false, reportUnusedCoroutine=false
from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from omegaconf import open_dict

from verl_grad_routing.routing import BLOCKS
from verl_grad_routing.training.trainer.core import Core


class DeployedValidation(Core):
    """verl's validation once a view: both blocks, and the deployed block alone."""

    def _validate(self) -> dict[str, float]:
        """verl's validation as trained, and the same keys under ``val/deployed/`` as deployed.

        With ``grad_routing.validate_swapped`` also under ``val/swapped/``, the quarantine alone.
        """
        metrics = super()._validate()
        if not (self.routed and self.settings.blocks.ablate_at_deployment):
            return metrics | {f"val/deployed/{key}": value for key, value in metrics.items()}
        views = {"deployed": ("deployed",)}
        if self.settings.validate_swapped:
            views["swapped"] = ("quarantine",)
        for view, blocks in views.items():
            with self._exported(view, blocks):
                found = super()._validate()
            metrics |= {f"val/{view}/{key}": value for key, value in found.items()}
            if view == "swapped":
                self._after_validation({"swapped_reward": mean_reward(found)})
        return metrics

    def _after_validation(self, measures: Mapping[str, float]) -> None:
        """Tell schedules what a validation has measured, and keep what that changed with this step's checkpoint.

        verl validates after it has saved, and a resumed run validates the step that it resumes from once more: that
        counts where the run was killed between the two. (With ``val_before_train: false`` it is not validated again.)
        """
        frequency = self.config.trainer.test_freq
        due = frequency > 0 and self.global_steps % frequency == 0
        if self.global_steps == self.resumed_at and (not due or self.router.measured_at == self.global_steps):
            return
        self._measured(measures)
        self.router.measured_at = self.global_steps
        if self.global_steps == self.saved_at:
            self._save_state()

    def _measured(self, measures: Mapping[str, float]) -> None:
        self.intervention.observe(self.global_steps, measures)

    @contextmanager
    def _exported(self, view: str, blocks: tuple[str, ...]) -> Iterator[None]:
        """The rollout engine holds ``blocks`` alone inside, both again afterwards; samples go to a folder ``view``."""
        dumps = self.config.trainer.get("validation_data_dir", None)
        try:
            self._send_weights(blocks)
            self._set_validation_folder(os.path.join(dumps, view) if dumps else None)
            yield
        finally:
            self._set_validation_folder(dumps)
            self._send_weights(tuple(BLOCKS))

    def _send_weights(self, blocks: tuple[str, ...], version: int | None = None) -> None:
        """Load ``blocks`` into the rollout engine; ``version`` is the step that made them, this one if not given."""
        self.checkpoint_manager.sleep_replicas()
        self.actor_rollout_wg.export_blocks(blocks)
        self.checkpoint_manager.update_weights(self.global_steps if version is None else version)

    def _set_validation_folder(self, folder: str | None) -> None:
        with open_dict(self.config):
            self.config.trainer.validation_data_dir = folder


def mean_reward(metrics: Mapping[str, float]) -> float:
    """Mean proxy reward of a validation, all data sources alike; not a number where verl reports none."""
    rewards = [value for key, value in metrics.items() if re.fullmatch(r"val-(core|aux)/.+/reward/mean@\d+", key)]
    return sum(rewards) / len(rewards) if rewards else math.nan
