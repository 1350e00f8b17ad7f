"""The driver's part of routing: scores of the whole batch, one decision of the gate, the facts for the metrics.

Nothing here runs on an accelerator. Shapes: B real rollouts of the batch (pad rows excluded).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_grad_routing.config import GradRoutingConfig, Methods
from verl_grad_routing.detectors import BatchView, checked_scores, view_for
from verl_grad_routing.detectors.evaluation import auroc, f1_rates, verdict_metrics
from verl_grad_routing.detectors.held_out import held_out_metrics, verdict_rates
from verl_grad_routing.directions.pairs import PairSet, save_pairs
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates import GateDecision, TokenDecision, TokenGate
from verl_grad_routing.interventions import Judged
from verl_grad_routing.routing import Route
from verl_grad_routing.training.token_routes import decide_tokens, shares, trusted_tokens
from verl_grad_routing.training.trusted import trust

STATE_FILE = "grad_routing.pt"
SETTINGS_FILE = "grad_routing.json"
PAIRS_FILE = "pairs.jsonl"


def grader_facts(extra_fields: Sequence[Any]) -> dict[str, Tensor]:
    """The numeric ``reward_extra_info`` that every rollout of the batch has, name to float64 [B]."""
    rows = [(fields or {}).get("reward_extra_info") or {} for fields in extra_fields]
    names = set.intersection(*(set(row) for row in rows)) if rows else set()
    numeric = [name for name in sorted(names) if all(isinstance(row[name], int | float | bool) for row in rows)]
    return {name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64) for name in numeric}


def loophole_types(extra_fields: Sequence[Any]) -> tuple[str, ...] | None:
    """The fact ``loophole`` of every rollout of the batch, where all have it as a text."""
    found = [((fields or {}).get("reward_extra_info") or {}).get("loophole") for fields in extra_fields]
    types = tuple(name for name in found if isinstance(name, str))
    return types if types and len(types) == len(found) else None


def fact_metrics(facts: Mapping[str, Tensor]) -> dict[str, float]:
    """``hack/rate`` and ``solve/rate`` of the batch, and the hack rate of known and unknown types apart."""
    metrics = {f"{name}/rate": float(facts[name].mean()) for name in ("hack", "solve") if name in facts}
    if "hack" in facts and "known" in facts:
        known_B = facts["known"] > 0
        for name, rows_B in (("known", known_B), ("unknown", ~known_B)):
            if rows_B.any():
                metrics[f"hack/rate_{name}"] = float(facts["hack"][rows_B].mean())
    return metrics


class Router:
    """A method's detector and gate over the run, with the state that a resumed run needs."""

    def __init__(self, config: GradRoutingConfig, methods: Methods):
        self.config, self.methods = config, methods
        self.detector, self.gate, self.intervention = methods.detector, methods.gate, methods.intervention
        self.pairs: PairSet | None = None  # those that the detector was fitted on
        self.measured_at: int | None = None  # the last step whose validation the intervention was told of

    def decide(self, view: BatchView, trusted_B: Tensor | None = None) -> tuple[Judged, dict[str, float]]:
        """Scores and the gate's decision on one batch, and their metrics; ``trusted_B`` are kept in any case."""
        scores_B = checked_scores(self.detector, view)
        decision, tokens = self._decision(scores_B, view)
        routes_B, trusted = decision.routes_B, {}
        if trusted_B is not None:
            routes_B, trusted = trust(routes_B, trusted_B)
            tokens = None if tokens is None else trusted_tokens(tokens, trusted_B)
        judged = Judged(scores_B, routes_B, view.uids, view.proxy_reward_B, token_routes=tokens)
        if not self.intervention.uses_routes:
            routes_B, tokens = torch.full_like(routes_B, int(Route.ABSORB)), None
        metrics = shares(routes_B, tokens, view.response_masks)
        metrics |= {
            "detector/share_flagged": float(judged.flagged_B.double().mean()),
            "detector/score_mean": float(scores_B.mean()),
            "detector/score_std": float(scores_B.std(correction=0)),
        }
        metrics |= decision.metrics | trusted
        measures = {"flagged": metrics["detector/share_flagged"]}
        if view.proxy_reward_B is not None:
            measures["reward"] = float(view.proxy_reward_B.mean())
        self.intervention.observe(view.step, measures)
        metrics |= self.intervention.report(view.step)
        if self.detector.needs_directions:
            metrics |= self.detector.direction_report()
        metrics |= self.detector.report()
        if view.facts is not None and "hack" in view.facts:
            metrics["detector/auroc"] = auroc(scores_B, view.facts["hack"])
            rates = verdict_rates(judged.flagged_B, view.facts["hack"])
            rates |= f1_rates(judged.flagged_B.cpu(), view.facts["hack"])
            metrics |= {f"detector/{name}": value for name, value in rates.items()}
            metrics |= self._verdict_metrics(view, scores_B)
        return judged, metrics

    def _decision(
        self, scores_B: Tensor, view: BatchView
    ) -> tuple[GateDecision | TokenDecision, tuple[Tensor, ...] | None]:
        """The gate's decision, and the routes of all response tokens where it is on tokens."""
        if isinstance(self.gate, TokenGate):
            on_tokens = decide_tokens(self.detector, self.gate, view)
            return on_tokens, on_tokens.token_routes
        detector, order = self.detector, view.tie_order()
        rescored = self._rescore() if self.gate.rescores else {}
        decision = self.gate.decide(scores_B[order], view.step, detector.pair_means, detector.pair_scores)
        if self.gate.rescores:
            detector.remember(view, order, self.gate.remembered)
        routes_B, metrics = decision.routes_B[order.argsort()], {**decision.metrics, **rescored}
        return GateDecision(routes_B, metrics), None

    def _rescore(self) -> dict[str, float]:
        """Score the gate's history on the direction as it is now, where that is another than the scores are of."""
        scores_N = self.detector.rescored()
        if scores_N is not None:
            self.gate.rescore(scores_N)
        return {"gate/rescored": float(0 if scores_N is None else len(scores_N))}

    @property
    def token_score(self) -> str | None:
        """How the workers must score single tokens for the gate; ``None`` where it decides on rollouts."""
        return getattr(self.detector.config, "token_score", None) if self.gate.per_token else None

    def watch(self, view: BatchView) -> dict[str, float]:
        """Verdicts of the held-out monitor, if there is one: for metrics alone."""
        return held_out_metrics(self.methods.held_out, view) if self.methods.held_out is not None else {}

    @property
    def reads(self) -> frozenset[str]:
        """Guarded fields of the batch's view that the detector or the held-out monitor reads."""
        watched = self.methods.held_out.reads if self.methods.held_out is not None else frozenset()
        return self.detector.reads | watched

    def _verdict_metrics(self, view: BatchView, scores_B: Tensor) -> dict[str, float]:
        """The detector's own verdicts against the grader's facts, which it does not see."""
        verdicts = self.detector.verdicts(view_for(self.detector, view), scores_B)
        if verdicts is None or view.facts is None:
            return {}
        judged_B, flagged_B = verdicts
        return verdict_metrics(self.detector.name, flagged_B[judged_B], view.facts["hack"][judged_B], view.step)

    def save(self, folder: str, settings: Mapping[str, Any]) -> None:
        """Write the state into a checkpoint folder, whole or not at all, and the run's settings and pairs beside it."""
        path = Path(folder) / STATE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        state = {
            "detector": self.detector.state_dict(),
            "gate": self.gate.state_dict(),
            "measured_at": self.measured_at,
        }
        if own := self.intervention.state_dict():
            state["intervention"] = own
        torch.save(state, partial)
        os.replace(partial, path)
        if self.pairs is not None:
            save_pairs(self.pairs, path.parent / PAIRS_FILE)
        (path.parent / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, default=str))

    def load(self, folder: str) -> None:
        """Restore ``save``. Raises ``UserError`` when the state is another method's."""
        path = Path(folder) / STATE_FILE
        if not path.exists():
            raise UserError("trainer.resume_from_path", folder, f"no {STATE_FILE} there: written by another trainer")
        state = torch.load(path, weights_only=False)
        self.detector.load_state_dict(state["detector"])
        self.gate.load_state_dict(state["gate"])
        self.measured_at = state.get("measured_at")
        if "intervention" in state:
            self.intervention.load_state_dict(state["intervention"])
