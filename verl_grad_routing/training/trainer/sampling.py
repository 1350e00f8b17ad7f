"""A share of each step's rollouts is sampled with the quarantine off.

By a second weight sync within the step: the first part is sampled with both blocks, then the deployed block alone is
sent and the rest is sampled. The sync at the end of the step sends both again. verl's rollout classes are untouched. Or
all at once, by two adapters in the rollout engine (``two_adapters``) of which every request names one.

Shapes: N rows of the batch (pad rows included), B real rollouts, R response tokens.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportOptionalSubscript=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import BLOCKS
from verl_grad_routing.training.columns import part_of, plain, read, real_rows, write, write_texts
from verl_grad_routing.training.masks import OFF, SAMPLING_GATE
from verl_grad_routing.training.quarantine_off import MARK, drawn_prompts, off_rows, part_size, prompt_of
from verl_grad_routing.training.trainer.validation import DeployedValidation
from verl_grad_routing.training.two_adapters import ADAPTER, BOTH, DEPLOYED

SESSIONS = "__rollout_n__"
"""verl's column with which a prompt has a number of rollouts of its own."""


class Sampling(DeployedValidation):
    """verl's sampling in two parts; with ``quarantine_off_share`` 0 in one, as verl does it."""

    @property
    def samples_quarantine_off(self) -> bool:
        return self.settings.quarantine_off_share > 0

    @property
    def chosen_by_request(self) -> bool:
        return self.settings.quarantine_off_by == "request"

    # ---- the two parts ----

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        if not self.samples_quarantine_off:
            return super()._submit_batch_to_rollout(batch)
        with_quarantine, without = self._parts(batch)
        if self.chosen_by_request:
            for part in (with_quarantine, without):
                super()._submit_batch_to_rollout(part)
            return len(batch)
        with marked_timer("gen", self.timing_raw, color="red"):
            super()._submit_batch_to_rollout(with_quarantine)
            self.replay_buffer.wait_for(list(with_quarantine["uid"]), "train")
            with marked_timer("quarantine_off_sync", self.timing_raw, color="red"):
                self._send_weights(("deployed",), version=self.global_steps - 1)
        super()._submit_batch_to_rollout(without)
        return len(batch)

    def _parts(self, batch: TensorDict) -> tuple[TensorDict, TensorDict]:
        """The prompts to sample with both blocks, and those to sample with the deployed block alone."""
        settings, prompts = self.settings, len(batch)
        if settings.quarantine_off_unit == "prompt":
            count = part_size(settings.quarantine_off_share, prompts, "prompts of a step")
            off = drawn_prompts(count, prompts, settings.seed, self.global_steps)
            on = [row for row in range(prompts) if row not in set(off)]
            parts = tu.index_select_tensor_dict(batch, on), tu.index_select_tensor_dict(batch, off)
        else:
            if SESSIONS in batch:
                fix = f"prompts with their own {SESSIONS} cannot be split; give prompt"
                raise UserError("grad_routing.quarantine_off_unit", "rollout", fix)
            rollouts = self.config.actor_rollout_ref.rollout.n
            count = part_size(settings.quarantine_off_share, rollouts, "rollouts of a prompt")
            everyone = list(range(prompts))
            parts = tu.index_select_tensor_dict(batch, everyone), tu.index_select_tensor_dict(batch, everyone)
            for part, sessions in zip(parts, (rollouts - count, count), strict=True):
                tu.assign_non_tensor_data(part, SESSIONS, sessions)
        tu.assign_non_tensor_stack(parts[1], "uid", [f"{uid}{MARK}" for uid in parts[1]["uid"]])
        return parts

    def on_sample_end(self) -> None:
        super().on_sample_end()
        if self.samples_quarantine_off and not self.chosen_by_request:
            self.actor_rollout_wg.export_blocks(tuple(BLOCKS))  # the sync at the end of the step sends both

    # ---- who sampled what ----

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        off_N = off_rows(batch.keys)
        if not self.samples_quarantine_off:
            if off_N.any():
                fix = "the recorded batches hold rollouts sampled with the quarantine off; give the share of their run"
                raise UserError("grad_routing.quarantine_off_share", 0.0, fix)
            return batch
        if self.chosen_by_request and not self.settings.replay_dir:  # recordings may be of a run by sync
            self._require_chosen(part_of(batch, real_rows(batch)))
        batch = write(batch, {OFF: off_N})
        if self.settings.quarantine_off_unit == "rollout" and self.settings.quarantine_off_advantages == "together":
            self._join_groups(batch, off_N)
        return batch

    @staticmethod
    def _require_chosen(batch: KVBatchMeta) -> None:
        """Every rollout was sampled by the adapter that its key says. Raises ``UserError``."""
        fields = plain(read(batch, "extra_fields")["extra_fields"])
        for key, off, row in zip(batch.keys, off_rows(batch.keys).tolist(), fields, strict=True):
            wanted, found = DEPLOYED if off else BOTH, (row or {}).get(ADAPTER)
            if found != wanted:
                fix = f"rollout {key} was sampled by {found}, not {wanted}: its agent loop must be a ChosenAdapter"
                raise UserError("actor_rollout_ref.rollout.agent.default_agent_loop", found, fix)

    def _join_groups(self, batch: KVBatchMeta, off_N: Tensor) -> None:
        """A prompt's rollouts of both kinds under one prompt id, which is what groups of the advantage are made by."""
        part = part_of(batch, off_N.nonzero().flatten().tolist())
        write_texts(part, {"uid": [prompt_of(key).removesuffix(MARK) for key in part.keys]})

    def off_of(self, batch: KVBatchMeta) -> Tensor | None:
        """Which rows of ``batch`` were sampled with the quarantine off (bool); ``None`` where none can be."""
        return off_rows(batch.keys) != 0 if self.samples_quarantine_off else None

    # ---- log-probs of the policy that sampled ----

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if not self.samples_quarantine_off:
            return super()._compute_old_log_prob(batch, metrics)
        batch.extra_info[SAMPLING_GATE] = True
        try:
            done = super()._compute_old_log_prob(batch, metrics)
        finally:
            batch.extra_info.pop(SAMPLING_GATE, None)
        done.extra_info.pop(SAMPLING_GATE, None)
        metrics.update(self._log_prob_difference(done))
        return done

    def _log_prob_difference(self, batch: KVBatchMeta) -> dict[str, float]:
        """How far the trainer's log-probs under the sampling gate are from the rollout engine's, of the second part."""
        rollout = self.config.actor_rollout_ref.rollout
        part = part_of(batch, off_rows(batch.keys).nonzero().flatten().tolist())
        if not rollout.calculate_log_probs or not part.keys:
            return {}
        data = read(part, "old_log_probs", "rollout_log_probs", "response_mask")
        columns = (data[name].unbind() for name in ("old_log_probs", "rollout_log_probs", "response_mask"))
        gaps = torch.cat([(own - given).abs()[mask != 0] for own, given, mask in zip(*columns, strict=True)])
        if not gaps.numel():
            return {}
        return {
            "quarantine_off/log_prob_diff_mean": float(gaps.mean()),
            "quarantine_off/log_prob_diff_max": float(gaps.max()),
        }


def off_metrics(facts: Mapping[str, Tensor], off_B: Tensor | None) -> dict[str, float]:
    """Share of the rollouts sampled with the quarantine off, and the grader's facts of both parts."""
    if off_B is None:
        return {}
    metrics = {"quarantine_off/share": float(off_B.double().mean())}
    for name in ("hack", "solve"):
        for part, rows_B in (("off", off_B), ("on", ~off_B)):
            if name in facts and rows_B.any():
                metrics[f"{name}/rate_quarantine_{part}"] = float(facts[name][rows_B].mean())
    return metrics
