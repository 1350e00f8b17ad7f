"""verl's replay buffer with a limit on waiting, and with batches recorded to disk or read back from it.

Stock verl takes it as well: ``trainer.v1.sampler.custom_sampler.{path,name}`` with the settings below in
``trainer.v1.sampler.sampler_kwargs``. That is how a run of stock verl and one of ours train on the same batches.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false
from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from verl_grad_routing.errors import UserError

POLL_S = 0.2  # verl's default of 2 s is most of a small run's generation time


class RoutedReplayBuffer(ReplayBuffer):
    """Settings (``sampler_kwargs``): ``rollout_timeout_s``, ``record_dir``, ``replay_dir``, each optional."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.configure(**(kwargs.get("sampler_kwargs") or {}))

    entries_per_prompt: int
    """Prompt ids under which each prompt of a training batch is submitted."""

    def configure(
        self, rollout_timeout_s: float = 600.0, record_dir: str | None = None, replay_dir: str | None = None
    ) -> None:
        """Set the limit on waiting and the folders; also used on a buffer that verl has already built."""
        self.rollout_timeout_s, self.record_dir, self.replay_dir = rollout_timeout_s, record_dir, replay_dir
        self.entries_per_prompt = 1
        self.poll_interval = min(self.poll_interval, POLL_S)
        self._progress: tuple[tuple[int, ...], float] = ((), time.monotonic())
        self.after_sample: Callable[[KVBatchMeta], KVBatchMeta] | None = None  # while the rollout engine is still awake

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        finished = (len(self.finished_keys[partition_id]), len(self.failure_keys[partition_id]))
        progress = (len(self.partitions[partition_id]), *finished)  # rollouts, then prompts with all of theirs
        if progress != self._progress[0]:
            self._progress = (progress, time.monotonic())
        waited = time.monotonic() - self._progress[1]
        if waited > self.rollout_timeout_s:
            raise RuntimeError(
                f"grad_routing.rollout_timeout_s={self.rollout_timeout_s}: no rollout of partition {partition_id!r} "
                f"has finished for {waited:.0f} s; look for the rollout worker's own error above, or raise the limit"
            )
        return super()._wait_for_next_poll(partition_id, last_debug_time)

    def wait_for(self, uids: Sequence[str], partition_id: str) -> None:
        """Return when all rollouts of these prompts have ended."""
        self._progress, last_debug_time = ((), time.monotonic()), time.time()
        while True:
            self._sync_metadata_from_transfer_queue()
            if set(uids) <= self.finished_keys[partition_id] | self.failure_keys[partition_id]:
                return
            last_debug_time = self._wait_for_next_poll(partition_id, last_debug_time)

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        self._progress = ((), time.monotonic())
        if partition_id == "train":
            batch_size *= self.entries_per_prompt
        batch, metrics = super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
        if partition_id == "train" and self.replay_dir:
            tq.kv_clear(keys=batch.keys, partition_id=partition_id)
            return load_batch(self.replay_dir, global_steps), metrics
        if self.after_sample is not None:
            batch = self.after_sample(batch)
        if partition_id == "train" and self.record_dir:
            save_batch(self.record_dir, global_steps, batch)
        return batch, metrics


def batch_file(folder: str, step: int) -> Path:
    return Path(folder) / f"batch_{step:06d}.pt"


def save_batch(folder: str, step: int, batch: KVBatchMeta) -> None:
    """Write all fields of a batch, whole or not at all."""
    path = batch_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
    partial = path.with_suffix(".partial")
    torch.save({"keys": batch.keys, "tags": batch.tags, "fields": fields}, partial)
    os.replace(partial, path)


def load_batch(folder: str, step: int) -> KVBatchMeta:
    """Put a recorded batch into the TransferQueue. Raises ``UserError`` when there is none for this step."""
    path = batch_file(folder, step)
    if not path.exists():
        raise UserError(
            "grad_routing.replay_dir", folder, f"{path.name} is missing: no batch was recorded at that step"
        )
    saved = torch.load(path, weights_only=False)
    tq.kv_batch_put(keys=saved["keys"], partition_id="train", tags=saved["tags"], fields=saved["fields"])
    return KVBatchMeta(partition_id="train", keys=list(saved["keys"]), tags=list(saved["tags"]))
