"""Other methods in shadow: what they would say of the same rollouts of the same step, and what they would have taught.

They read what the run's own method reads, in the same passes; nothing of them reaches a weight. Shapes: N rows of the
batch (pad rows included), B real rollouts, R response tokens.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils.debug import marked_timer

from verl_grad_routing.detectors import BatchView, Detector, FingerprintDetector, view_for
from verl_grad_routing.gates import Gate
from verl_grad_routing.interventions import INTERVENTIONS, Intervention, Judged
from verl_grad_routing.routing import Route, RoutingTable
from verl_grad_routing.shadows import ARM, Shadow, build_shadows, told_of
from verl_grad_routing.training.agreement import mass_discarded, rank_correlation, verdict_agreement
from verl_grad_routing.training.columns import part_of, read, real_rows, write
from verl_grad_routing.training.gradient_comparison import ASKED, OLD_LOG_PROBS, Variant
from verl_grad_routing.training.masks import TABLE
from verl_grad_routing.training.random_state import same_random_state
from verl_grad_routing.training.router import Router
from verl_grad_routing.training.shadow_state import load_states, save_states
from verl_grad_routing.training.trainer.learning import MASKS, Learning

ROUTER_METRICS = ("routing/", "detector/", "gate/")


@dataclass(frozen=True)
class Taught:
    """What a method makes of the batch: columns of all N rows and tables, as the engine would train on them."""

    advantages: list[Tensor]
    masks: dict[str, list[Tensor]]
    routes_N: Tensor
    tables: Mapping[str, RoutingTable]

    def columns(self, prefix: str) -> dict[str, Any]:
        named = {"advantages": self.advantages, **self.masks, "route": self.routes_N}
        return {f"{prefix}{name}": column for name, column in named.items()}


class Comparing(Learning):
    """Asks every shadow (``grad_routing.compare``) at each step, after the run's own method and before it acts."""

    def __init__(self, config: DictConfig):
        super().__init__(config)
        self.shadows: list[Shadow] = build_shadows(self.settings)
        self.shadow_routers = {shadow.name: Router(self.settings, shadow.methods) for shadow in self.shadows}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._taught: dict[str, Taught] = {}
        self._old_log_probs: list[Tensor] = []
        self._fingerprints_taken: dict[str, tuple[Tensor, Tensor]] = {}

    # ---- what shadows read ----

    @property
    def detectors(self) -> list[Detector]:
        return [*super().detectors, *(shadow.methods.detector for shadow in self.shadows)]

    def _gate_of(self, detector: Detector) -> Gate:
        theirs = (shadow.methods.gate for shadow in self.shadows if shadow.methods.detector is detector)
        return next(theirs, None) or super()._gate_of(detector)

    def _own_scoring_pass(self, batch: KVBatchMeta, which: str) -> None:
        """The extra forward is charged to the shadows that need it, if the run's own method does not."""
        readers = [reader.detector for reader in self.readers if reader.which == which]
        names = [shadow.name for shadow in self.shadows if shadow.methods.detector in readers]
        started = time.perf_counter()
        super()._own_scoring_pass(batch, which)
        if self.detector not in readers:
            for name in names:
                self._seconds[name] += (time.perf_counter() - started) / len(names)

    def _fingerprinted(self, real: KVBatchMeta, view: BatchView, detector: FingerprintDetector) -> BatchView:
        """Fingerprints of one probe are taken once: a detector with the probe of another takes over its rows."""
        if not self.shadows:
            return super()._fingerprinted(real, view, detector)
        if detector.layers is not None and detector.probe.hash in self._fingerprints_taken:
            chosen_B, found_BF = self._fingerprints_taken[detector.probe.hash]
            wanted_B = detector.chosen_rows(view_for(detector, view))
            if not (wanted_B & ~chosen_B).any():
                return dataclasses.replace(view, fingerprints_BF=torch.where(wanted_B[:, None], found_BF, 0.0))
        seen = super()._fingerprinted(real, view, detector)
        assert seen.fingerprints_BF is not None
        chosen_B = detector.chosen_rows(view_for(detector, view))
        self._fingerprints_taken[detector.probe.hash] = (chosen_B, seen.fingerprints_BF)
        return seen

    # ---- verdicts ----

    def _observe(self, batch: KVBatchMeta, view: BatchView, judged: Judged, metrics: dict) -> None:
        super()._observe(batch, view, judged, metrics)
        if not self.shadows:
            return
        with marked_timer("compare", self.timing_raw, color="purple"), same_random_state():
            plain = self._taught_by(batch, INTERVENTIONS["none"](INTERVENTIONS["none"].Config()), judged)
            ours = self._taught_by(batch, self.intervention, judged)
            metrics[f"compare/{ARM}/advantage_mass_discarded"] = self._discarded(batch, plain, ours)
            due = self._gradients_are_due()
            self._taught = {ARM: ours} if due else {}
            if due:
                self._old_log_probs = list(read(batch, "old_log_probs")["old_log_probs"].unbind())
            for shadow in self.shadows:
                started = time.perf_counter()
                with told_of(shadow.name):
                    theirs, own = self._judged_by(shadow, batch, view)
                    taught = self._taught_by(batch, shadow.methods.intervention, theirs)
                self._seconds[shadow.name] += time.perf_counter() - started
                if due:
                    self._taught[shadow.name] = taught
                own |= verdict_agreement(
                    self.intervention.verdicts(judged), shadow.methods.intervention.verdicts(theirs)
                )
                own["score_correlation"] = rank_correlation(judged.scores_B, theirs.scores_B)
                own["advantage_mass_discarded"] = self._discarded(batch, plain, taught)
                own["seconds"] = self._seconds.pop(shadow.name)
                metrics.update({f"compare/{shadow.name}/{key}": value for key, value in own.items()})
        self._fingerprints_taken.clear()

    def _judged_by(self, shadow: Shadow, batch: KVBatchMeta, view: BatchView) -> tuple[Judged, dict[str, float]]:
        """The shadow's verdicts and its own metrics. ``view`` may hold what only the run's detector may see."""
        detector = shadow.methods.detector
        bare = dataclasses.replace(view, activation_scores_BD=None, features_BLd=None, fingerprints_BF=None)
        seen = self._seen_by(detector, part_of(batch, real_rows(batch)), bare)
        theirs, metrics = self._decided(self.shadow_routers[shadow.name], batch, seen)
        own = {key.partition("/")[2]: value for key, value in metrics.items() if not key.startswith(ROUTER_METRICS)}
        if "detector/auroc" in metrics:
            own["auroc"] = metrics["detector/auroc"]
        return theirs, own

    def _measured(self, measures: Mapping[str, float]) -> None:
        super()._measured(measures)
        for shadow in self.shadows:
            shadow.methods.intervention.observe(self.global_steps, measures)

    # ---- advantages ----

    def _taught_by(self, batch: KVBatchMeta, intervention: Intervention, judged: Judged) -> Taught:
        """Advantages, masks and routes of ``batch`` under ``intervention``, by the very code that the run's own takes.

        The TransferQueue holds the run's masks and rewards again afterwards, and no advantage that will not be
        overwritten.
        """
        before = {name: list(read(batch, name)[name].unbind()) for name in MASKS}
        with self._standing_in(intervention):
            rejected = self._rejected(batch, judged, {})
            with self._shaped_rewards(batch, judged, {}):
                written = self._advantages(batch, rejected, {})
            self._shaped_advantages(written, judged, {})
            tables = self._tables()
        data = read(batch, "advantages", *MASKS)
        masks = {name: list(data[name].unbind()) for name in MASKS}
        write(batch, before)
        routes_N = torch.full((len(batch.keys),), int(Route.ABSORB), dtype=torch.int64)
        if intervention.uses_routes:
            routes_N[real_rows(batch)] = judged.routes_B
        return Taught(list(data["advantages"].unbind()), masks, routes_N, tables)

    @contextmanager
    def _standing_in(self, intervention: Intervention) -> Iterator[None]:
        """``intervention`` in place of the run's own inside; what verl adapts on the way is put back."""
        ours, controller = self.intervention, getattr(self, "kl_ctrl_in_reward", None)
        self.intervention = intervention
        if controller is not None:
            self.kl_ctrl_in_reward = copy.deepcopy(controller)
        try:
            yield
        finally:
            self.intervention = ours
            if controller is not None:
                self.kl_ctrl_in_reward = controller

    def _discarded(self, batch: KVBatchMeta, plain: Taught, taught: Taught) -> float:
        """See ``agreement.mass_discarded``: routes withhold from the deployed block, the rest acts on advantages."""
        real = real_rows(batch)
        _, updates_32 = taught.tables[TABLE].as_tensors()
        update_B = updates_32[taught.routes_N[real]][:, 0]
        return mass_discarded(_padded(plain, real), _padded(taught, real), update_B)

    # ---- gradients ----

    def _gradients_are_due(self) -> bool:
        every = self.settings.compare_gradients_every
        return every > 0 and self.global_steps % every == 0

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self._taught:
            with marked_timer("compare_gradients", self.timing_raw, color="purple"):
                found = self._compared_gradients(batch)
            metrics.update({f"compare/{key}": value for key, value in found.items()})
            self._taught, self._old_log_probs = {}, []
        return super()._update_actor(batch, metrics)

    def _compared_gradients(self, batch: KVBatchMeta) -> dict[str, float]:
        """The workers' comparison of every shadow's gradient with the run's own, on columns that nothing else reads."""
        columns: dict[str, Any] = {OLD_LOG_PROBS: self._old_log_probs}
        variants = []
        for index, (name, taught) in enumerate(self._taught.items()):
            variants.append(Variant(name, f"variant_{index}_", taught.tables))
            columns |= taught.columns(variants[-1].prefix)
        written = write(batch, columns)
        actor = self.config.actor_rollout_ref.actor
        settings = {
            ASKED: tuple(variants),
            "calculate_entropy": bool(actor.calculate_entropy or actor.entropy_coeff != 0.0),
            "temperature": self.config.actor_rollout_ref.rollout.temperature,
            "global_batch_size": actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n,
            "distillation_use_topk": False,
            "distillation_only": False,
        }
        asked = KVBatchMeta(written.keys, written.tags, written.partition_id, written.fields, settings)
        return dict(self.actor_rollout_wg.compare_gradients(asked)["metrics"])

    # ---- checkpoints ----

    def _save_state(self) -> None:
        if self.shadows:
            folder = os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
            save_states(self.shadow_routers, folder)
        super()._save_state()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.shadows and self.global_steps > 0:
            load_states(self.shadow_routers, self._checkpoint_folder())


def _padded(taught: Taught, rows: list[int]) -> Tensor:
    """Advantages [B, R] of ``rows``, 0 where no token counts."""
    used = [taught.advantages[row] * (taught.masks["response_mask"][row] != 0) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(used, batch_first=True)
