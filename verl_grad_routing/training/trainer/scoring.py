"""Scores of a batch: activations read in a pass that verl runs anyway, or in one of the trainer's own; fingerprints.

Shapes: B real rollouts, L layers, d hidden size, F length of a fingerprint.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transfer_queue import KVBatchMeta
from verl.utils.debug import marked_timer

from verl_grad_routing.detectors import BatchView, view_for
from verl_grad_routing.directions import load_pairs
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.bottleneck_pass import pair_gradients, rollout_scores
from verl_grad_routing.training.bottleneck_step import ReadGradients
from verl_grad_routing.training.columns import dense, part_of, plain, read, real_rows
from verl_grad_routing.training.fingerprint_pass import adjacent_cosines, fingerprints
from verl_grad_routing.training.pairs_pass import pool_pairs
from verl_grad_routing.training.probe import Project
from verl_grad_routing.training.router import grader_facts, loophole_types
from verl_grad_routing.training.trainer.core import Core
from verl_grad_routing.training.trusted import KEY, column_of, trusted_rows


class Scoring(Core):
    """Fits the detector's direction at the start, reads activations in every step, and builds the batch's view."""

    @property
    def has_direction(self) -> bool:
        return self.routed and self.detector.needs_directions

    @property
    def reads_activations(self) -> bool:
        return self.has_direction and not self.detector.needs_gradients

    @property
    def reads_gradients(self) -> bool:
        return self.has_direction and self.detector.needs_gradients

    @property
    def reads_fingerprints(self) -> bool:
        return self.routed and self.detector.needs_fingerprints

    # ---- the direction ----

    def _load_checkpoint(self) -> None:
        # before verl's own: the direction is that of the untrained model, and a resumed run's is loaded over it
        if self.has_direction:
            shape = self.actor_rollout_wg.model_shape()[0]
            self.layers = layers = self.detector.resolve_layers(shape["layers"])
            self.hidden_size = shape["hidden_size"]
            self.bottleneck = self.detector.place(layers)
            if self.bottleneck is not None:
                self.layers, digest_M = self.actor_rollout_wg.bottleneck_modules(self.bottleneck)[0]
                self.hidden_size = self.bottleneck.rank
                self.detector.placed(digest_M)
            self.score_pass = self.detector.resolve_score_pass(self.ref_in_actor and self.use_reference_policy)
            self.pairs = load_pairs(self.detector.config.pairs) if self.detector.needs_pairs else None
            self.router.pairs = self.pairs
            self._fit_directions()
            print(
                f"grad_routing: scores are read in the {self.score_pass} pass {self._place(layers)} of "
                f"{shape['layers']}; pairs {self.pairs.content_hash if self.pairs else 'none'}"
            )
        super()._load_checkpoint()

    def _place(self, layers: tuple[int, ...]) -> str:
        if self.bottleneck is None:
            return f"after layers {list(layers)}"
        what = "gradients" if self.reads_gradients else "activations"
        kind = f"{what} of rank {self.bottleneck.rank} ({self.bottleneck.basis})"
        return f"as {kind} in {len(self.layers)} modules of layers {list(layers)}"

    def _fit_directions(self) -> None:
        pooled = (None, None)
        if self.pairs is not None and self.reads_gradients:
            even = self._even_rows(2 * len(self.pairs), backward=True)
            asked = ReadGradients(self.bottleneck)
            pooled = pair_gradients(self.actor_rollout_wg, self.pairs, self.tokenizer, asked, self.score_pass, *even)
        elif self.pairs is not None:
            rows, batching = self._even_rows(2 * len(self.pairs))
            pooled = pool_pairs(
                self.actor_rollout_wg,
                self.pairs,
                self.tokenizer,
                self.layers,
                self.detector.pair_position,
                self.score_pass,
                rows,
                batching,
                self.bottleneck,
            )
        pairs_hash = self.pairs.content_hash if self.pairs is not None else None
        self.detector.fit(*pooled, self.layers, self.hidden_size, pairs_hash)

    def on_step_begin(self) -> None:
        super().on_step_begin()
        every = self.detector.config.refresh_every if self.has_direction else 0
        if every and self.score_pass != "reference" and self.global_steps > 1 and (self.global_steps - 1) % every == 0:
            with marked_timer("refresh_direction", self.timing_raw, color="purple"):
                self._fit_directions()

    # ---- the passes ----

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._probing(batch, "policy"):
            return super()._compute_old_log_prob(batch, metrics)

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._probing(batch, "reference"):
            return super()._compute_ref_log_prob(batch, metrics)

    @contextmanager
    def _probing(self, batch: KVBatchMeta, which: str) -> Iterator[None]:
        """Let the pass inside project the rollouts' activations, if ``which`` is the pass that is read."""
        if not self.reads_activations or self.score_pass != which:
            yield
            return
        batch.extra_info["probe"] = self._projection()
        try:
            yield
        finally:
            batch.extra_info.pop("probe", None)

    def _own_scoring_pass(self, batch: KVBatchMeta) -> None:
        """The one extra forward, where no pass that verl runs can be read."""
        extra = {"no_lora_adapter": self.score_pass == "reference", "ablate_quarantine": self.score_pass == "ablated"}
        self._log_prob_pass(batch, {"probe": self._projection(), **extra})

    def _projection(self) -> Project:
        return Project(self.layers, self.detector.directions_DLd, self.detector.position, self.bottleneck)

    def _gradient_scores(self, real: KVBatchMeta) -> torch.Tensor:
        """Scores [B, D] of the rollouts' own gradients."""
        with marked_timer("gradient_scores", self.timing_raw, color="purple"):
            asked = ReadGradients(self.bottleneck, self.detector.directions_DLd, self.detector.cosine)
            even = self._even_rows(len(real.keys), backward=True)
            return rollout_scores(self.actor_rollout_wg, real, asked, self.score_pass, *even)

    def _log_prob_pass(self, batch: KVBatchMeta, extra: dict[str, Any]) -> None:
        """Log-probs of ``batch`` into its ``log_probs`` field, without a loss or entropies."""
        settings = {
            "calculate_entropy": False,
            "compute_loss": False,
            "temperature": self.config.actor_rollout_ref.rollout.temperature,
        }
        self.actor_rollout_wg.compute_log_prob(
            KVBatchMeta(
                keys=batch.keys,
                tags=batch.tags,
                partition_id=batch.partition_id,
                fields=batch.fields,
                extra_info={**settings, **extra},
            )
        )

    def _pass_was_made(self) -> bool:
        correction = self.config.algorithm.get("rollout_correction", None)
        bypass = bool(correction and correction.get("bypass_mode", False))
        return {
            "policy": not bypass,
            "reference": self.use_reference_policy and self.ref_in_actor,
            "ablated": False,
        }[self.score_pass]

    def _even_rows(self, count: int, backward: bool = False) -> tuple[int, dict[str, int]]:
        """The least number of rows, at least ``count``, that ranks and micro-batches divide, and their setting.

        Micro-batches are those of the log-prob pass; of the update with ``backward``, whose activations are kept.
        """
        group, role = self.actor_rollout_wg, "actor"
        if role not in group._dispatch_info:
            group._dispatch_info[role] = group._query_dispatch_info(role)
        ranks = max(group._dispatch_info[role]) + 1
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        per_rank = math.ceil(count / ranks)
        if rollout.log_prob_use_dynamic_bsz:
            return per_rank * ranks, {"max_token_len_per_gpu": actor.ppo_max_token_len_per_gpu} if backward else {}
        limit = actor.ppo_micro_batch_size_per_gpu if backward else rollout.log_prob_micro_batch_size_per_gpu
        batches = math.ceil(per_rank / limit)
        size = math.ceil(per_rank / batches)
        return ranks * batches * size, {"micro_batch_size_per_gpu": size}

    # ---- what is known of the batch ----

    def _view(self, batch: KVBatchMeta) -> BatchView:
        """The real rollouts of ``batch``, scored activations and fingerprints included."""
        if self.reads_activations and not self._pass_was_made():
            self._own_scoring_pass(batch)
        real = part_of(batch, real_rows(batch))
        fields = ["uid", "extra_fields", "rm_scores"]
        texts: dict[str, tuple[str, ...]] = {}
        fields += sorted({"prompts", "responses"} & self.detector.reads)
        if self.reads_activations:
            fields.append("activation_scores")
        data = read(real, *fields)
        for name in fields:
            if name in ("prompts", "responses"):
                rows = data[name].unbind()
                texts[name] = tuple(self.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows)
        scores_BD = dense(data["activation_scores"]) if self.reads_activations else None
        if self.reads_gradients:
            scores_BD = self._gradient_scores(real)
        extra = plain(data["extra_fields"])
        view = BatchView(
            keys=tuple(real.keys),
            uids=tuple(str(uid) for uid in plain(data["uid"])),
            step=self.global_steps,
            seed=self.settings.seed,
            activation_scores_BD=scores_BD,
            proxy_reward_B=torch.stack([row.sum() for row in data["rm_scores"].unbind()]),
            facts=grader_facts(extra),
            types=loophole_types(extra),
            **texts,
        )
        return self._fingerprinted(real, view) if self.reads_fingerprints else view

    def _trusted(self, batch: KVBatchMeta) -> torch.Tensor | None:
        """Which real rollouts of ``batch`` are of rows that are trusted to be clean, bool [B]."""
        name = self.settings.trusted_column
        if name is None:
            return None
        real = part_of(batch, real_rows(batch))
        column = column_of(name)
        if real.fields is not None and column not in real.fields:
            raise UserError(KEY, name, f"the dataset has no column {column}; rollouts have {', '.join(real.fields)}")
        return trusted_rows(name, plain(read(real, column)[column]), real.keys)

    def _fingerprinted(self, real: KVBatchMeta, view: BatchView) -> BatchView:
        """``view`` with the fingerprints that the detector asks for; zeros where it does not ask."""
        with marked_timer("fingerprint", self.timing_raw, color="purple"):
            if self.detector.layers is None:
                layers = self.actor_rollout_wg.model_shape()[0]["layers"]
                even = self._even_rows(len(real.keys))
                self.detector.choose_layers(adjacent_cosines(self.actor_rollout_wg, real, layers, *even))
                print(f"grad_routing: the gradient probe sits in layers {list(self.detector.layers)} of {layers}")
            chosen_B = self.detector.chosen_rows(view_for(self.detector, view))
            probe = self.detector.probe
            found_BF = torch.zeros(len(real.keys), probe.dim)
            rows = chosen_B.nonzero().flatten().tolist()
            if rows:
                even = self._even_rows(len(rows), backward=True)
                found_BF[rows] = fingerprints(self.actor_rollout_wg, part_of(real, rows), probe, *even)
        return dataclasses.replace(view, fingerprints_BF=found_BF)
