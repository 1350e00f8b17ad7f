"""Confessions in a step and at validation: who is asked, whose rows theirs take, advantages of their own.

Below the rooms that route and shape, so that neither detectors nor interventions ever meet a confession.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.debug import marked_timer

from verl_grad_routing.confessions import (
    Confession,
    build_judge,
    confession_metrics,
    draw,
    judged,
    rejection_metrics,
)
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.columns import (
    CONFESSION,
    PADDING,
    confession_rows,
    live_rows,
    part_of,
    plain,
    read,
    real_rows,
    write,
)
from verl_grad_routing.training.confession_loss import WEIGHT
from verl_grad_routing.training.confession_rollouts import (
    ConfessionRollouts,
    put_confessions,
    rest_of,
    spoken_in,
)
from verl_grad_routing.training.trainer.core import Core


class Confessing(Core):
    """Asks for confessions while the rollout engine is awake, and keeps their learning apart from the answers'."""

    @property
    def trains_confessions(self) -> bool:
        return self.settings.confessions.trains

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        if self.trains_confessions or self.settings.confessions.validate:
            buffer.after_sample = self._after_sample
        self.validated: list[Confession] = []
        self.penalties: dict[str, float] = {}  # of this step's answers, by key: verl keeps no tag of ours
        return buffer

    def _after_sample(self, batch: KVBatchMeta) -> KVBatchMeta:
        settings = self.settings.confessions
        if batch.partition_id == "train" and settings.trains:
            with marked_timer("confess", self.timing_raw, color="red"):
                return self._with_confessions(batch)
        if batch.partition_id == "val" and settings.validate:
            spoken = self._rollouts(self.config.actor_rollout_ref.rollout.val_kwargs).ask(batch, 1)
            self.validated += [one.confession for one in spoken]
        return batch

    def _rollouts(self, sampling: Any) -> ConfessionRollouts:
        rollout = self.config.actor_rollout_ref.rollout
        params = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        params |= {"repetition_penalty": 1.0, "logprobs": rollout.calculate_log_probs}
        return ConfessionRollouts(self.settings.confessions, self.chat_tokenizer, self.get_llm_client(), params)

    # ---- the step's rows ----

    def _with_confessions(self, batch: KVBatchMeta) -> KVBatchMeta:
        """The batch with confessions in the rows of the answers that are not trained; those leave the TransferQueue."""
        settings = self.settings.confessions
        if any(_session(key)[2] for key in batch.keys):
            loop = self.config.actor_rollout_ref.rollout.agent.default_agent_loop
            raise UserError(
                "actor_rollout_ref.rollout.agent.default_agent_loop", loop, "confessions need one output a rollout"
            )
        batch = part_of(batch, sorted(range(len(batch.keys)), key=lambda row: _session(batch.keys[row])))
        data = read(batch, "uid", "index")
        uids, names = ([str(value) for value in plain(data[key])] for key in ("uid", "index"))
        drawn = draw(settings, uids, names, self.settings.seed, self.global_steps)
        if not drawn.asked:
            return batch
        asked = part_of(batch, drawn.asked)
        spoken = self._rollouts(self.config.actor_rollout_ref.rollout).ask(asked, settings.per_answer)
        kept = [one for one in spoken if drawn.asked[one.row] in set(drawn.taught)]
        rewards = judged(build_judge(str(settings.judge)), [one.confession for one in kept])
        confessions = put_confessions(asked, kept, rewards)
        self.penalties = {}
        if not settings.sealed:
            for row, answer in enumerate(drawn.asked):
                admitted = [one.confession.confessed is True for one in spoken if one.row == row]
                self.penalties[batch.keys[answer]] = settings.penalty * sum(admitted) / len(admitted)
        answers, left = part_of(batch, drawn.answers), rest_of(batch, drawn.answers)
        if left.keys:
            tq.kv_clear(keys=left.keys, partition_id=batch.partition_id)
        return KVBatchMeta(
            partition_id=batch.partition_id,
            keys=[*answers.keys, *confessions.keys],
            tags=[*answers.tags, *confessions.tags],
        )

    def _balance_batch(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> KVBatchMeta:
        batch = super()._balance_batch(batch, *args, **kwargs)
        if self.trains_confessions:
            # every row, padding too: the engine tells the two losses apart by it
            kinds = torch.full((len(batch.keys),), PADDING)
            kinds[live_rows(batch)] = 0
            kinds[confession_rows(batch)] = 1
            write(batch, {CONFESSION: kinds})
        return batch

    # ---- what they learn ----

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's own advantages, of the answers and of the confessions in calls of their own.

        So a confession's reward is in no statistic of the answers whatever the estimator whitens over, and the reverse.
        Where an intervention has rejected every answer, verl's padding is with the confessions.
        """
        rows = confession_rows(batch)
        if not rows:
            return super()._compute_advantage(batch, metrics)
        answers, confessions = rest_of(batch, rows), part_of(batch, rows)
        written = None
        if live_rows(answers):
            with self._penalised(answers, metrics):
                written = super()._compute_advantage(answers, metrics)
        own: dict[str, float] = {}
        written_too = super()._compute_advantage(batch if written is None else confessions, own)
        metrics.update({f"confession/{key}": value for key, value in own.items()})
        metrics.update(self._confession_metrics(confessions))
        fields = (written or written_too).fields
        return KVBatchMeta(batch.keys, batch.tags, batch.partition_id, fields, batch.extra_info)

    @contextmanager
    def _penalised(self, answers: KVBatchMeta, metrics: dict) -> Iterator[None]:
        """``seal_broken``: inside, answers have lost the penalty of what their confessions admit."""
        charged = part_of(answers, [row for row, key in enumerate(answers.keys) if key in self.penalties])
        if not charged.keys:
            yield
            return
        rows = read(charged, "rm_scores")["rm_scores"].unbind()
        penalties = [self.penalties[key] for key in charged.keys]
        changed = [row.clone() for row in rows]
        for row, penalty in zip(changed, penalties, strict=True):
            row[-1] -= penalty
        metrics["confession/penalty_mean"] = sum(penalties) / len(penalties)
        write(charged, {"rm_scores": changed})
        try:
            yield
        finally:
            write(charged, {"rm_scores": list(rows)})

    def _confession_metrics(self, confessions: KVBatchMeta) -> dict[str, float]:
        found, rewards = spoken_in(confessions)
        metrics = confession_metrics(found) | {"reward_mean": sum(rewards) / len(rewards), "count": float(len(found))}
        return {f"confession/{key}": value for key, value in metrics.items()}

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self.trains_confessions and self.settings.confessions.weight is not None:
            batch.extra_info[WEIGHT] = self.settings.confessions.weight
        batch = super()._update_actor(batch, metrics)
        for key in [key for key in metrics if key.startswith("actor/confession/")]:
            metrics[key.removeprefix("actor/")] = metrics.pop(key)
        return batch

    # ---- what is reported ----

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> None:
        """verl's metrics of rewards, advantages and lengths, of the answers alone."""
        rows = confession_rows(batch)
        answers = rest_of(batch, rows) if rows and real_rows(batch) else batch
        super()._compute_metrics(answers, metrics, *args, **kwargs)

    def _validate(self) -> dict[str, float]:
        """verl's validation; its answers' confessions, and what is left of the answers when only clean ones count."""
        self.validated.clear()
        metrics = super()._validate()
        found = confession_metrics(self.validated) | rejection_metrics(self.validated)
        return metrics | {f"val/confession/{key}": value for key, value in found.items()}


def _session(key: str) -> tuple[str, int, int]:
    uid, session, index = key.rsplit("_", 2)
    return uid, int(session), int(index)
