"""What every room of the trainer stands on: settings, workers, replay buffer, checkpoints, a watch on the rollout."""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
from __future__ import annotations

import os
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_grad_routing.chat import with_switches
from verl_grad_routing.config import build_methods, parse
from verl_grad_routing.training.router import Router
from verl_grad_routing.training.shared_queue import refuse_another_runs_queue
from verl_grad_routing.training.watchdog import Watchdog
from verl_grad_routing.training.worker import RoutedActorRolloutRefWorker

ACTOR_ROLES = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef, Role.RefPolicy)


class Core(PPOTrainerSync):
    """Builds, resumes and ends a run; knows nothing of scores and routes.

    Attributes:
        settings: The configuration under ``grad_routing``.
        router: Detector and gate, with their state.
        routed: Whether there are blocks to route into; the preset ``off`` has none.
    """

    resumed_at: int | None = None  # steps
    saved_at: int | None = None

    def __init__(self, config: DictConfig):
        refuse_another_runs_queue(OmegaConf.select(config, "ray_kwargs.ray_init.address"))
        self.settings = parse(OmegaConf.to_container(config.grad_routing, resolve=True))
        self.router = Router(self.settings, build_methods(self.settings))
        self.detector, self.intervention = self.router.detector, self.router.intervention
        self.routed = self.settings.blocks.enabled
        self.watchdog = Watchdog(self._release_waiting_workers)
        super().__init__(config)

    @property
    def trainer_mode(self) -> str:
        """verl branches on this name; in everything that it decides, this trainer is the sync one."""
        return "sync"

    @trainer_mode.setter
    def trainer_mode(self, _: str) -> None:
        return None

    def _build_replay_buffer(self) -> ReplayBuffer:
        # here, not above: importing it first imports verl's trainer, which registers this module
        from verl_grad_routing.training.replay import RoutedReplayBuffer

        buffer = super()._build_replay_buffer()
        if type(buffer) is ReplayBuffer:
            buffer.__class__ = RoutedReplayBuffer
            settings = self.settings
            buffer.configure(settings.rollout_timeout_s, settings.record_dir, settings.replay_dir)
            if settings.quarantine_off_share and settings.quarantine_off_unit == "rollout":
                buffer.entries_per_prompt = 2
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            if role in ACTOR_ROLES:
                self.role_worker_mapping[role] = ray.remote(RoutedActorRolloutRefWorker)

    @property
    def chat_tokenizer(self) -> Any:
        """The model's tokenizer with the chat template's switches, as verl renders the run's prompts."""
        return with_switches(self.tokenizer, self.config.data.get("apply_chat_template_kwargs"))

    # ---- the rollout engine's death ends the run ----

    def on_init_end(self) -> None:
        self.watchdog.start(self.llm_server_manager.get_addresses())
        with self.watchdog.names_the_cause():
            super().on_init_end()

    def fit(self, agent_loop_manager: Any) -> None:
        with self.watchdog.names_the_cause():
            super().fit(agent_loop_manager)
        self.watchdog.stop()

    def _release_waiting_workers(self) -> None:
        """A worker that hands its weights to a dead engine waits for ever, and the trainer for it."""
        for worker in self.actor_rollout_wg.workers:
            ray.kill(worker)

    # ---- checkpoints ----

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps > 0:
            self.router.load(self._checkpoint_folder())
            self.resumed_at = self.global_steps

    def _checkpoint_folder(self) -> str:
        if self.config.trainer.resume_mode == "resume_path":
            return self.config.trainer.resume_from_path
        return os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")

    def _save_checkpoint(self) -> None:
        # before verl's own, which ends by naming this step the latest: a folder that is named is complete
        self._save_state()
        super()._save_checkpoint()
        self.saved_at = self.global_steps

    def _save_state(self) -> None:
        """Detector, gate and intervention as they are, into this step's checkpoint."""
        folder = os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
        self.router.save(folder, OmegaConf.to_container(self.config.grad_routing, resolve=True))
