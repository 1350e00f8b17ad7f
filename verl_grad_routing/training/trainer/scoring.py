"""Scores of a batch: activations read in a pass that verl runs anyway, or in one of the trainer's own; fingerprints.

Shapes: B real rollouts, L layers, d hidden size, F length of a fingerprint.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transfer_queue import KVBatchMeta
from verl.utils.debug import marked_timer

from verl_grad_routing.bottleneck import Bottleneck
from verl_grad_routing.detectors import ActivationDetector, BatchView, Detector, FingerprintDetector, view_for
from verl_grad_routing.directions import PairSet, load_pairs
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates import Gate
from verl_grad_routing.training.bottleneck_pass import pair_gradients, rollout_rows
from verl_grad_routing.training.bottleneck_step import ReadGradients
from verl_grad_routing.training.columns import dense, part_of, plain, read, real_rows
from verl_grad_routing.training.fingerprint_pass import adjacent_cosines, fingerprints
from verl_grad_routing.training.names import names_of
from verl_grad_routing.training.pairs_pass import pool_pairs
from verl_grad_routing.training.probe import Project, Projections
from verl_grad_routing.training.router import grader_facts, loophole_types
from verl_grad_routing.training.trainer.sampling import Sampling
from verl_grad_routing.training.trusted import KEY, column_of, trusted_rows

PASSES = ("reference", "policy", "ablated")


@dataclass(frozen=True)
class Reader:
    """A detector with a direction, and what it reads in the pass ``which``.

    Attributes:
        rows: What its direction has a row for: layers by number, or with a ``bottleneck`` its modules by name.
        width: Length of such a row: the hidden size, or the bottleneck's rank.
        place: The same for the log.
        token_score: How single tokens are scored beside the rollouts; ``None``: not at all.
        features: Hand over what is projected, too: the gate scores its history again.
    """

    detector: ActivationDetector
    rows: tuple[Any, ...]
    width: int
    which: str
    pairs: PairSet | None
    bottleneck: Bottleneck | None
    place: str
    token_score: str | None = None
    features: bool = False

    @property
    def in_passes(self) -> bool:
        """It reads activations, in a pass that may serve others; gradients take a pass of their own."""
        return not self.detector.needs_gradients

    @property
    def projection(self) -> Project:
        vectors_DLd, position = self.detector.directions_DLd, self.detector.position
        return Project(self.rows, vectors_DLd, position, self.bottleneck, self.token_score, self.features)


class Scoring(Sampling):
    """Fits the detectors' directions at the start, reads activations in every step, and builds the batch's view."""

    readers: Sequence[Reader] = ()
    refreshed_at = 0  # the step in which directions were last looked after

    @property
    def detectors(self) -> list[Detector]:
        """Every detector of the run, its own first."""
        return [self.detector] if self.routed else []

    def _gate_of(self, detector: Detector) -> Gate:
        """The gate that decides on a detector's scores."""
        assert detector is self.detector
        return self.router.gate

    # ---- the directions ----

    def _load_checkpoint(self) -> None:
        # before verl's own: the direction is that of the untrained model, and a resumed run's is loaded over it
        self.readers = made = list[Reader]()
        readers = [detector for detector in self.detectors if isinstance(detector, ActivationDetector)]
        if readers:
            shape = self.actor_rollout_wg.model_shape()[0]
            for detector in readers:
                reader = dataclasses.replace(self._reader(detector, shape), features=self._gate_of(detector).rescores)
                if detector is self.detector:
                    reader = dataclasses.replace(reader, token_score=self.router.token_score)
                made.append(reader)
                self._fit_direction(reader)
                print(
                    f"grad_routing: scores of {detector.name} are read in the {reader.which} pass {reader.place} of "
                    f"{shape['layers']}; pairs {reader.pairs.content_hash if reader.pairs else 'none'}"
                )
        self.router.pairs = next((reader.pairs for reader in self.readers if reader.detector is self.detector), None)
        super()._load_checkpoint()

    def _reader(self, detector: ActivationDetector, shape: dict[str, int]) -> Reader:
        which = detector.resolve_score_pass(self.ref_in_actor and self.use_reference_policy)
        pairs = load_pairs(detector.config.pairs) if detector.needs_pairs else None
        if pairs is not None:
            detector.expect(pairs)
        layers = detector.resolve_layers(shape["layers"])
        bottleneck = detector.place(layers)
        if bottleneck is None:
            place = f"after layers {list(layers)}"
            return Reader(detector, layers, shape["hidden_size"], which, pairs, None, place)
        modules, digest_M = self.actor_rollout_wg.bottleneck_modules(bottleneck)[0]
        detector.placed(digest_M)
        what = "gradients" if detector.needs_gradients else "activations"
        kind = f"{what} of rank {bottleneck.rank} ({bottleneck.basis})"
        place = f"as {kind} in {len(modules)} modules of layers {list(layers)}"
        return Reader(detector, modules, bottleneck.rank, which, pairs, bottleneck, place)

    def _fit_direction(self, reader: Reader) -> None:
        detector, pairs, pooled = reader.detector, reader.pairs, (None, None)
        if pairs is not None and detector.needs_gradients:
            even = self._even_rows(2 * len(pairs), backward=True)
            asked = ReadGradients(reader.bottleneck)
            pooled = pair_gradients(self.actor_rollout_wg, pairs, self.chat_tokenizer, asked, reader.which, *even)
        elif pairs is not None:
            even = self._even_rows(2 * len(pairs))
            where = (reader.rows, detector.pair_position, reader.which)
            pooled = pool_pairs(self.actor_rollout_wg, pairs, self.chat_tokenizer, *where, *even, reader.bottleneck)
        pairs_hash = pairs.content_hash if pairs is not None else None
        detector.fit(*pooled, reader.rows, reader.width, pairs_hash)

    def on_sample_end(self) -> None:
        """Directions are taken anew while the rollout engine sleeps, as every pass of the trainer is made."""
        super().on_sample_end()
        if self.refreshed_at == self.global_steps:  # a step may sample more than once
            return
        self.refreshed_at = self.global_steps
        for reader in self.readers:
            every = reader.detector.config.refresh_every if reader.which != "reference" else 0
            if every and self.global_steps > 1 and (self.global_steps - 1) % every == 0:
                with marked_timer("refresh_direction", self.timing_raw, color="purple"):
                    self._fit_direction(reader)

    # ---- the passes ----

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._probing(batch, "policy"):
            return super()._compute_old_log_prob(batch, metrics)

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self._probing(batch, "reference"):
            return super()._compute_ref_log_prob(batch, metrics)

    @contextmanager
    def _probing(self, batch: KVBatchMeta, which: str) -> Iterator[None]:
        """Let the pass inside project the rollouts' activations for every detector that reads the pass ``which``."""
        projections = self._projections(which)
        if not projections.parts:
            yield
            return
        batch.extra_info["probe"] = projections
        try:
            yield
        finally:
            batch.extra_info.pop("probe", None)

    def _own_scoring_pass(self, batch: KVBatchMeta, which: str) -> None:
        """An extra forward, where verl makes no such pass."""
        extra = {"no_lora_adapter": which == "reference", "ablate_quarantine": which == "ablated"}
        self._log_prob_pass(batch, {"probe": self._projections(which), **extra})

    def _projections(self, which: str) -> Projections:
        parts = tuple(reader.projection for reader in self.readers if reader.which == which and reader.in_passes)
        return Projections(parts, f"activation_scores_{which}")

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

    def _pass_was_made(self, which: str) -> bool:
        correction = self.config.algorithm.get("rollout_correction", None)
        bypass = bool(correction and correction.get("bypass_mode", False))
        return {
            "policy": not bypass,
            "reference": self.use_reference_policy and self.ref_in_actor,
            "ablated": False,
        }[which]

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
        """The real rollouts of ``batch`` as the run's own detector may score them, and all texts that any reads."""
        read_passes = [which for which in PASSES if self._projections(which).parts]
        for which in read_passes:
            if not self._pass_was_made(which):
                self._own_scoring_pass(batch, which)
        real = part_of(batch, real_rows(batch))
        columns = {which: f"activation_scores_{which}" for which in read_passes}
        texts: dict[str, tuple[str, ...]] = {}
        asked = self.router.reads.union(*(detector.reads for detector in self.detectors))
        written = sorted({"prompts", "responses"} & asked)
        data = read(real, "uid", "index", "extra_fields", "rm_scores", *written, *columns.values())
        for name in written:
            rows = data[name].unbind()
            texts[name] = tuple(self.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows)
        self.activations = {which: dense(data[column]) for which, column in columns.items()}
        extra = plain(data["extra_fields"])
        prompt_names, names = names_of(real.keys, plain(data["index"]))
        view = BatchView(
            keys=tuple(real.keys),
            names=names,
            prompt_names=prompt_names,
            uids=tuple(str(uid) for uid in plain(data["uid"])),
            step=self.global_steps,
            seed=self.settings.seed,
            proxy_reward_B=torch.stack([row.sum() for row in data["rm_scores"].unbind()]),
            facts=grader_facts(extra),
            types=loophole_types(extra),
            **texts,
        )
        return self._seen_by(self.detector, real, view) if self.routed else view

    def _seen_by(self, detector: Detector, real: KVBatchMeta, view: BatchView) -> BatchView:
        """``view`` with the activations, gradients and fingerprints that ``detector`` asks for."""
        if detector.needs_directions:
            reader = next(reader for reader in self.readers if reader.detector is detector)
            scored = self._activation_scores if reader.in_passes else self._gradient_scores
            scores_BD, features_BLd = scored(real, reader)
            view = dataclasses.replace(view, activation_scores_BD=scores_BD, features_BLd=features_BLd)
            if reader.token_score is not None:
                column = f"{self._projections(reader.which).column}_tokens"
                data = read(real, column, "response_mask")
                rows = {"activation_token_scores": column, "response_masks": "response_mask"}
                view = dataclasses.replace(view, **{name: tuple(data[c].unbind()) for name, c in rows.items()})
        return self._fingerprinted(real, view, detector) if detector.needs_fingerprints else view

    def _activation_scores(self, real: KVBatchMeta, mine: Reader) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The columns [B, D] that the pass read for a detector, and the features [B, L, d] where it needs them."""
        served = [reader for reader in self.readers if reader.which == mine.which and reader.in_passes]
        parts = self.activations[mine.which].split([len(r.detector.directions_DLd) for r in served], dim=1)
        place = next(place for place, reader in enumerate(served) if reader is mine)
        if not mine.features:
            return parts[place], None
        column = f"{self._projections(mine.which).column}_features_{place}"
        return parts[place], dense(read(real, column)[column]).unflatten(1, (-1, mine.width))

    def _gradient_scores(self, real: KVBatchMeta, reader: Reader) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores [B, D] of the rollouts' own gradients, and the coordinates [B, M, r] where the detector needs them."""
        detector = reader.detector
        with marked_timer("gradient_scores", self.timing_raw, color="purple"):
            asked = ReadGradients(reader.bottleneck)  # the coordinates themselves
            if not reader.features:
                asked = ReadGradients(reader.bottleneck, detector.directions_DLd, detector.cosine)
            even = self._even_rows(len(real.keys), backward=True)
            rows_BX = rollout_rows(self.actor_rollout_wg, real, asked, reader.which, *even)
        if not reader.features:
            return rows_BX, None
        features_BLd = rows_BX.unflatten(1, (-1, reader.width))
        return detector.projected(features_BLd), features_BLd

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

    def _fingerprinted(self, real: KVBatchMeta, view: BatchView, detector: FingerprintDetector) -> BatchView:
        """``view`` with the fingerprints that ``detector`` asks for; zeros where it does not ask."""
        with marked_timer("fingerprint", self.timing_raw, color="purple"):
            if detector.layers is None:
                layers = self.actor_rollout_wg.model_shape()[0]["layers"]
                even = self._even_rows(len(real.keys))
                detector.choose_layers(adjacent_cosines(self.actor_rollout_wg, real, layers, *even))
                print(f"grad_routing: the gradient probe sits in layers {list(detector.layers or ())} of {layers}")
            chosen_B = detector.chosen_rows(view_for(detector, view))
            probe = detector.probe
            found_BF = torch.zeros(len(real.keys), probe.dim)
            rows = chosen_B.nonzero().flatten().tolist()
            if rows:
                even = self._even_rows(len(rows), backward=True)
                found_BF[rows] = fingerprints(self.actor_rollout_wg, part_of(real, rows), probe, *even)
        return dataclasses.replace(view, fingerprints_BF=found_BF)
