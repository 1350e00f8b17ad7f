"""GRIFT: clusters of gradient fingerprints, one of which a judge finds to hack.

Legend: ``B`` rollouts, ``P`` fingerprinted ones of them, ``F`` length of a fingerprint, ``2`` (clean, hacking).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.base import DETECTORS, BatchView, Signal
from verl_grad_routing.detectors.fingerprint import FingerprintConfig, FingerprintDetector
from verl_grad_routing.detectors.monitor import build_judge, checked_rules
from verl_grad_routing.directions.checks import require_choice, require_int, require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import Clusters, match, nearest, soft_scores, two_clusters
from verl_grad_routing.fingerprints.probe import KEY

LABELS = ("judge", "centroids", "gt_anchor")
ANCHORS = 16  # least number of rollouts that the environment labels


class Abstained(IntEnum):
    """Why a step's scores are all zero."""

    NO = 0
    FEW = 1  # fewer positive rollouts than min_positives
    ONE_CLOUD = 2  # silhouette below min_silhouette
    SMALL_CLUSTER = 3  # a cluster with less than min_cluster_share of them
    NOT_TOLD_APART = 4  # the labels call both clusters mostly clean, or both equally


@DETECTORS.register("grift")
class Grift(FingerprintDetector):
    """Scores a positively rewarded rollout by its gradient fingerprint (GRIFT, arXiv 2604.16242).

    The fingerprint is the normalised random projection of the gradient of the response's negative log-likelihood with
    respect to a frozen probe in the layers with the smallest adjacent-layer cosine. K-means cuts the fingerprints of
    the batch in two; labels of the rollouts nearest to each centroid say which cluster is clean; then

        S_i = e^{-d-} / (e^{-d+} + e^{-d-}),   d+ and d- the squared distances to the clean and the hacking centroid,

    high is hacking. Rollouts without a positive reward have score 0 and no fingerprint.

    Labels: a judge of texts (``rules`` or a function); ``centroids`` that an earlier run saved, by the least costly
    bijection; or, as a control, the environment's truth about the same rollouts (``gt_anchor``). The clusters are
    labelled anew every ``relabel_every`` steps, and matched to those of the step before in between.

    The paper's rule condemns one cluster whatever it holds. On-policy that would punish a cluster of right answers
    before any hacking exists, so the detector abstains (all scores 0) where the data do not show two kinds; see
    ``Abstained``. That rule, and the use in on-policy GRPO, are ours.

    The clustering reads the whole batch, so scores depend on neighbours (``judges_whole_batch``), not on their order.
    """

    signal: ClassVar[Signal] = Signal.reward
    score_range: ClassVar[tuple[float, float] | None] = (0, 1)
    judges_whole_batch: bool = True

    @dataclass(frozen=True, kw_only=True)
    class Config(FingerprintConfig):
        positive_reward: float = 1.0  # rollouts with at least this proxy reward are fingerprinted
        label_by: str = "judge"  # judge, centroids, or gt_anchor (the truth: a control)
        rules: tuple[str, ...] | None = None  # judge: regular expressions, one found in the response is hacking
        judge: str | None = None  # judge: package.module:function of (prompt, response), 1 or true is hacking
        centroids: str | None = None  # centroids: grad_routing.pt of a checkpoint of an earlier run
        labels_per_cluster: int = 16  # rollouts nearest to each centroid that are labelled
        relabel_every: int = 1  # steps between labellings
        min_positives: int = 16  # abstain with fewer fingerprints
        min_silhouette: float = 0.1  # abstain below
        min_cluster_share: float = 0.05  # abstain when a cluster has less
        cluster_seed: int = 0  # of k-means

        def __post_init__(self) -> None:
            super().__post_init__()
            require_choice("label_by", self.label_by, LABELS)
            if self.label_by == "judge":
                object.__setattr__(self, "rules", checked_rules(self.rules, self.judge))
            if (self.label_by == "centroids") != (self.centroids is not None):
                fix = "give the grad_routing.pt of an earlier run's checkpoint, with label_by: centroids alone"
                raise UserError("centroids", self.centroids, fix)
            require_number("positive_reward", self.positive_reward)
            for field in ("labels_per_cluster", "relabel_every"):
                require_int(field, getattr(self, field), 1)
            if self.label_by == "gt_anchor" and 2 * self.labels_per_cluster < ANCHORS:
                fix = f"two clusters need at least {ANCHORS} labelled rollouts; give {ANCHORS // 2} or more"
                raise UserError("labels_per_cluster", self.labels_per_cluster, fix)
            require_int("min_positives", self.min_positives, 2)
            require_number("min_silhouette", self.min_silhouette, -1, 1)
            require_number("min_cluster_share", self.min_cluster_share, 0, 0.5)
            require_int("cluster_seed", self.cluster_seed, 0)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.judge = build_judge(config.rules, config.judge) if config.label_by == "judge" else None
        self.centroids_2F: Tensor | None = None
        self._saved_2F: Tensor | None = None  # of an earlier run
        self.labelled_at = 0  # the step of the last labelling
        self.labelled_by = config.label_by  # of adopted centroids: who labelled the run that saved them
        self._report: dict[str, float] = {}
        if config.label_by == "centroids":
            self._adopt(Path(str(config.centroids)))

    @property
    def knows_everything(self) -> bool:
        """The labels are the truth: the environment's own, or those that an earlier run's centroids were named by."""
        return self.labelled_by == "gt_anchor"

    @property
    def reads(self) -> frozenset[str]:
        extra = {"judge": {"prompts", "responses"}, "gt_anchor": {"facts"}}.get(self.config.label_by, set())
        return super().reads | extra

    def chosen_rows(self, view: BatchView) -> Tensor:
        if view.proxy_reward_B is None:
            raise UserError(KEY, self.name, "the batch has no rewards; only positive rollouts are fingerprinted")
        return view.proxy_reward_B.cpu() >= self.config.positive_reward

    # ---- scores ----

    def score(self, view: BatchView) -> Tensor:
        scores_B = torch.zeros(len(view.keys), dtype=torch.float64)
        rows, fingerprints_PF = self._fingerprints(view)
        self._report = {f"{self.name}/fingerprinted": len(rows) / len(view.keys)}
        reason = self._cluster(view, rows, fingerprints_PF)
        self._report |= {f"{self.name}/abstain": float(reason > 0), f"{self.name}/abstain_reason": float(reason)}
        if reason is Abstained.NO:
            assert self.centroids_2F is not None
            scores_B[rows] = soft_scores(fingerprints_PF, *self.centroids_2F)
        return scores_B

    def report(self) -> dict[str, float]:
        return dict(self._report)

    def verdicts(self, view: BatchView, scores_B: Tensor) -> tuple[Tensor, Tensor] | None:
        if self._report.get(f"{self.name}/abstain"):
            return None
        judged_B = torch.zeros(len(view.keys), dtype=torch.bool)
        judged_B[self._fingerprints(view)[0]] = True
        return judged_B, scores_B > 0.5

    def _fingerprints(self, view: BatchView) -> tuple[list[int], Tensor]:
        """Row numbers of the fingerprinted rollouts in the order of their keys, and their fingerprints, float64."""
        if view.fingerprints_BF is None:
            raise UserError(KEY, self.name, "the batch has no fingerprints; the worker must take them")
        fingerprints_BF = view.fingerprints_BF.detach().cpu().double()
        bad_B = ~torch.isfinite(fingerprints_BF).all(1)
        if bad_B.any():
            row = int(bad_B.nonzero()[0])
            fix = "fingerprints must be finite; look for inf or NaN in the model's gradients"
            raise UserError(f"{KEY} ({self.name}) fingerprint of rollout {view.keys[row]}", float("nan"), fix)
        present_B = (fingerprints_BF != 0).any(1) & self.chosen_rows(view)
        rows = sorted(present_B.nonzero().flatten().tolist(), key=lambda row: view.drawn_by[row])
        return rows, fingerprints_BF[rows]

    def _cluster(self, view: BatchView, rows: list[int], fingerprints_PF: Tensor) -> Abstained:
        """Find this batch's centroids, or say why there are none."""
        config = self.config
        if len(rows) < config.min_positives:
            return Abstained.FEW
        clusters = two_clusters(fingerprints_PF, config.cluster_seed)
        self._report[f"{self.name}/silhouette"] = clusters.silhouette
        self._report[f"{self.name}/smallest_cluster"] = clusters.smallest_share
        if clusters.silhouette < config.min_silhouette:
            return Abstained.ONE_CLOUD
        if clusters.smallest_share < config.min_cluster_share:
            return Abstained.SMALL_CLUSTER
        if config.label_by == "centroids":
            assert self._saved_2F is not None
            self.centroids_2F = match(clusters.centroids_2F, self._saved_2F)
        elif self.centroids_2F is not None and view.step - self.labelled_at < config.relabel_every:
            self.centroids_2F = match(clusters.centroids_2F, self.centroids_2F)
        else:
            return self._label(view, rows, fingerprints_PF, clusters)
        return Abstained.NO

    # ---- labels ----

    def _label(self, view: BatchView, rows: list[int], fingerprints_PF: Tensor, clusters: Clusters) -> Abstained:
        """Name the clusters by the rollouts nearest to their centroids: the one with more clean ones is clean."""
        chosen = nearest(fingerprints_PF, clusters, self.config.labels_per_cluster)
        if self.knows_everything and sum(len(members) for members in chosen) < ANCHORS:
            return Abstained.FEW
        first, second = (
            sum(not self._is_hacking(view, rows[member]) for member in members) / len(members) for members in chosen
        )
        if first == second or min(first, second) > 0.5:
            self.centroids_2F = None  # of an earlier step; a judge that changed its mind is not overruled by them
            return Abstained.NOT_TOLD_APART
        self.centroids_2F = clusters.centroids_2F[[0, 1] if first > second else [1, 0]]
        self.labelled_at = view.step
        return Abstained.NO

    def _is_hacking(self, view: BatchView, row: int) -> bool:
        if self.judge is None:
            if view.facts is None or "hack" not in view.facts:
                raise UserError("batch.facts", sorted(view.facts or {}), "gt_anchor needs the grader's fact 'hack'")
            return bool(view.facts["hack"][row] > 0)
        if view.prompts is None or view.responses is None:
            raise UserError(KEY, self.name, "the batch has no texts; the judge needs prompts and responses")
        said: Any = self.judge(view.prompts[row], view.responses[row])
        if not isinstance(said, bool | int | float) or not 0 <= said <= 1:
            fix = "a judge must return true, false or a number from 0 to 1"
            raise UserError(f"{KEY}.judge on rollout {view.keys[row]}", said, fix)
        return said >= 0.5

    # ---- state ----

    def _adopt(self, file: Path) -> None:
        """Centroids and probe of an earlier run. Raises ``UserError``: no such file, or not those of this probe."""
        key = f"{KEY}.centroids"
        if not file.is_file():
            raise UserError(key, str(file), "no such file; give the grad_routing.pt of an earlier run's checkpoint")
        saved = torch.load(file, weights_only=True)
        state = saved.get("detector", {}) if isinstance(saved, dict) else {}
        if state.get("name") != self.name or state.get("centroids_2F") is None:
            raise UserError(key, str(file), "holds no labelled centroids of grift; take a later checkpoint")
        if state.get("labelled_by") not in ("judge", "gt_anchor"):
            raise UserError(
                key, str(file), "does not say who labelled its centroids; save them again with this version"
            )
        self.adopt_probe(state["probe"], f"{file} was made")
        self._saved_2F, self.labelled_by = state["centroids_2F"], state["labelled_by"]

    def state_dict(self) -> dict[str, Any]:
        mine = {"centroids_2F": self.centroids_2F, "labelled_at": self.labelled_at, "labelled_by": self.labelled_by}
        return {**super().state_dict(), **mine}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.centroids_2F, self.labelled_at = state["centroids_2F"], state["labelled_at"]
