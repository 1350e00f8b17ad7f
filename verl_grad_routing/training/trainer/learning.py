"""What each rollout teaches: its route, its reward, its advantage, or nothing.

Shapes: N rows of the batch (pad rows included), B real rollouts, R response tokens.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalSubscript=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transfer_queue import KVBatchMeta
from verl.utils.debug import marked_timer
from verl.workers.utils.padding import response_from_nested

from verl_grad_routing.detectors import BatchView
from verl_grad_routing.interventions import Intervention, Judged
from verl_grad_routing.routing import Route
from verl_grad_routing.token_weights import predicted_weights
from verl_grad_routing.training.columns import live_rows, part_of, read, real_rows, write
from verl_grad_routing.training.engine_hooks import ENGINE_HOOKS
from verl_grad_routing.training.masks import OFF_TABLE, TABLE, TOKEN_ROUTE, TOKEN_WEIGHT
from verl_grad_routing.training.own_gate import CURRENT, closed_rows
from verl_grad_routing.training.router import Router, fact_metrics
from verl_grad_routing.training.token_routes import column
from verl_grad_routing.training.trainer.sampling import off_metrics
from verl_grad_routing.training.trainer.scoring import Scoring

MASKS = ("response_mask", "loss_mask")


class Learning(Scoring):
    """Routes every batch before its advantages exist, and lets the intervention act on rewards and advantages."""

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with marked_timer("routing", self.timing_raw, color="purple"):
            view = self._view(batch)
            metrics.update(fact_metrics(view.facts or {}) | self.router.watch(view))
            metrics.update(off_metrics(view.facts or {}, self.off_of(part_of(batch, real_rows(batch)))))
            if not self.routed:
                return super()._compute_advantage(batch, metrics)
            judged, routing_metrics = self._decided(self.router, batch, view)
            metrics.update(routing_metrics)
        self._observe(batch, view, judged, metrics)
        with marked_timer("routing", self.timing_raw, color="purple"):
            batch = self._write_routes(batch, judged)
        with marked_timer("intervention", self.timing_raw, color="purple"):
            rejected = self._rejected(batch, judged, metrics)
        with self._shaped_rewards(batch, judged, metrics):
            batch = self._advantages(batch, rejected, metrics)
        with marked_timer("intervention", self.timing_raw, color="purple"):
            return self._shaped_advantages(batch, judged, metrics)

    def _decided(self, router: Router, batch: KVBatchMeta, view: BatchView) -> tuple[Judged, dict[str, float]]:
        """``router``'s decision on the real rollouts of ``batch``, with what holds for them whoever decides."""
        judged, metrics = router.decide(view, self._trusted(batch))
        return replace(judged, quarantine_off_B=self.off_of(part_of(batch, real_rows(batch)))), metrics

    def _observe(self, batch: KVBatchMeta, view: BatchView, judged: Judged, metrics: dict) -> None:
        """Called when the batch has been judged and nothing has been written yet; for looking, not for changing."""

    # ---- routes ----

    def _write_routes(self, batch: KVBatchMeta, judged: Judged) -> KVBatchMeta:
        """``route`` for every row, pad rows too (as ABSORB: they have no tokens), and those of tokens."""
        routes_N = torch.full((len(batch.keys),), int(Route.ABSORB), dtype=torch.int64)
        token_routes = None
        if self.intervention.uses_routes:
            routes_N[real_rows(batch)] = judged.routes_B
            if judged.token_routes is not None:
                lengths_N = [len(mask) for mask in read(batch, "response_mask")["response_mask"].unbind()]
                token_routes = column(judged.token_routes, real_rows(batch), lengths_N)
        columns: dict[str, Any] = {"route": routes_N}
        if token_routes is not None:
            columns[TOKEN_ROUTE] = token_routes
        if self.intervention.token_weights_V is not None:
            texts = read(batch, "prompts", "responses")
            rows = zip(texts["prompts"].unbind(), texts["responses"].unbind(), strict=True)
            columns[TOKEN_WEIGHT] = predicted_weights(self.intervention.token_weights_V, map(torch.cat, rows))
        batch = write(batch, columns)
        self._recompute_old_log_probs_of_keep(batch, routes_N, token_routes)
        return batch

    def _recompute_old_log_probs_of_keep(
        self, batch: KVBatchMeta, routes_N: torch.Tensor, token_routes: list[torch.Tensor] | None
    ) -> None:
        """KEEP rows train under another forward gate than they were sampled under, so their ratio must start at 1.

        Where the step is one on-policy update the update itself takes care of that. Else one forward over those rows,
        under their own gate; rows of the same batch whose gate is open fill it up to the
        multiple that the pass needs, and come out as they went in.
        """
        tables = self._tables()
        of_tokens = None
        if token_routes is not None:
            of_tokens = torch.cat(token_routes), torch.tensor([len(routes) for routes in token_routes])
        closed_N = closed_rows(routes_N, tables[TABLE], of_tokens)
        if (off_N := self.off_of(batch)) is not None:
            closed_N &= ~off_N  # these have the log-probs of the policy that sampled them
        if self._is_one_on_policy_update(len(batch.keys)) or not closed_N.any():
            return
        order = torch.argsort(closed_N.int(), descending=True, stable=True)
        count = int(closed_N.sum())
        needed, batching = self._even_rows(count)
        rows = order[:needed].tolist()
        part = part_of(batch, rows)
        self._log_prob_pass(part, {**tables, **batching})
        data = read(part, "log_probs", "response_mask")
        gated = response_from_nested(data["log_probs"], data["response_mask"]).unbind()
        all_rows = list(read(batch, "old_log_probs")["old_log_probs"].unbind())
        for row, values in list(zip(rows, gated, strict=True))[:count]:
            all_rows[row] = values
        write(batch, {"old_log_probs": all_rows})

    def _tables(self) -> dict[str, Any]:
        """What the routes of this step mean, for the engine."""
        tables = {TABLE: self.intervention.table_at(self.global_steps)}
        if self.samples_quarantine_off:
            tables[OFF_TABLE] = self.intervention.quarantine_off_table_at(self.global_steps)
        return tables

    def _is_one_on_policy_update(self, rows: int) -> bool:
        """Whether the whole batch is one mini-batch, seen once, and nothing else reads its old log-probs."""
        actor, algorithm = self.config.actor_rollout_ref.actor, self.config.algorithm
        if any(ENGINE_HOOKS[hook["name"]].recomputes for hook in self.settings.blocks.hooks):
            return False
        correction = algorithm.get("rollout_correction", None) or {}
        corrected = any(correction.get(key, None) for key in ("rollout_is", "rollout_rs", "bypass_mode"))
        one = actor.ppo_epochs == 1 and actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n >= rows
        return one and not corrected and not algorithm.use_kl_in_reward

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self.routed:
            batch.extra_info.update(self._tables())
            batch.extra_info[CURRENT] = self._is_one_on_policy_update(len(batch.keys))
        batch = super()._update_actor(batch, metrics)
        for key in [key for key in metrics if key.startswith("actor/routing/")]:
            metrics[key.removeprefix("actor/")] = metrics.pop(key)
        return batch

    # ---- rewards ----

    @contextmanager
    def _shaped_rewards(self, batch: KVBatchMeta, judged: Judged, metrics: dict) -> Iterator[None]:
        """The intervention's rewards in place of the proxy rewards inside, so that metrics see the latter."""
        if type(self.intervention).rewards is Intervention.rewards:
            yield
            return
        real = part_of(batch, real_rows(batch))
        rows = read(real, "rm_scores")["rm_scores"].unbind()
        rewards_B = torch.stack([row.sum() for row in rows])
        shaped_B = self.intervention.rewards(rewards_B, judged)
        metrics["intervention/reward_change"] = float((shaped_B - rewards_B).mean())
        shaped = [torch.zeros_like(row) for row in rows]
        for row, reward in zip(shaped, shaped_B, strict=True):
            row[-1] = reward
        write(real, {"rm_scores": shaped})
        try:
            yield
        finally:
            write(real, {"rm_scores": rows})

    # ---- advantages ----

    def _rejected(self, batch: KVBatchMeta, judged: Judged, metrics: dict) -> list[int]:
        """Row numbers of the rollouts that teach nothing at all."""
        rejected_B = self.intervention.rejected(judged)
        if rejected_B is None:
            return []
        metrics["intervention/share_rejected"] = float(rejected_B.double().mean())
        real = real_rows(batch)
        return [real[index] for index in rejected_B.nonzero().flatten().tolist()]

    def _advantages(self, batch: KVBatchMeta, rejected: list[int], metrics: dict) -> KVBatchMeta:
        """verl's own advantages, group statistics over the rollouts that are kept.

        A rejected rollout has advantage 0 and leaves both masks: the terms of verl's loss read ``response_mask``, the
        denominators are counted on ``loss_mask``.
        """
        if not rejected:
            return super()._compute_advantage(batch, metrics)
        gone = set(rejected)
        kept = part_of(batch, [row for row in range(len(batch.keys)) if row not in gone])
        names = ["advantages", "returns"]
        if self.config.algorithm.use_kl_in_reward:
            names.append("token_level_rewards")
        dropped = part_of(batch, rejected)
        if live_rows(kept):
            written = super()._compute_advantage(kept, metrics)
            names += [name for name in ("rollout_is_weights",) if name in written.fields]
        else:
            dropped = batch
        masks = read(dropped, *MASKS)
        zeros = [torch.zeros(len(mask), dtype=torch.float32) for mask in masks["response_mask"].unbind()]
        empty = {name: [torch.zeros_like(mask) for mask in masks[name].unbind()] for name in MASKS}
        written = write(dropped, {**dict.fromkeys(names, zeros), **empty})
        return KVBatchMeta(batch.keys, batch.tags, batch.partition_id, written.fields, batch.extra_info)

    def _shaped_advantages(self, batch: KVBatchMeta, judged: Judged, metrics: dict) -> KVBatchMeta:
        if type(self.intervention).advantages is Intervention.advantages:
            return batch
        real = part_of(batch, real_rows(batch))
        data = read(real, "advantages", "response_mask")
        rows = data["advantages"].unbind()
        before_BR = torch.nested.to_padded_tensor(data["advantages"], 0.0)
        after_BR = self.intervention.advantages(before_BR, judged)
        used_BR = torch.nested.to_padded_tensor(data["response_mask"], 0) != 0
        mass = float((before_BR.abs() * used_BR).sum())
        left = float((after_BR.abs() * used_BR).sum())
        metrics["intervention/advantage_mass_removed"] = (mass - left) / mass if mass > 0 else 0.0
        shaped = [after_BR[index, : len(row)] for index, row in enumerate(rows)]
        written = write(real, {"advantages": shaped})
        return KVBatchMeta(batch.keys, batch.tags, batch.partition_id, written.fields, batch.extra_info)
