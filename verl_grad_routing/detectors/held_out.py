"""A monitor that is kept out of training: its verdicts are logged and nothing else.

What a policy that is trained against one monitor learns to hide from it shows in another that it never met. Shapes: B.
"""

from __future__ import annotations

import math

from torch import Tensor

from verl_grad_routing.detectors.base import BatchView, Detector, checked_scores
from verl_grad_routing.detectors.evaluation import auroc
from verl_grad_routing.errors import UserError

KEY = "grad_routing.held_out_monitor"
PREFIX = "monitor/heldout"
VERDICT = 0.5  # a score of this and more is the verdict "unwanted", as of detector monitor


def require_text_reader(detector: Detector) -> None:
    """Refuse what cannot be asked beside training: a detector of activations or of gradients. Raises ``UserError``."""
    if detector.needs_directions or detector.needs_fingerprints:
        fix = "a held-out monitor reads texts; use monitor, with rules or a judge"
        raise UserError(f"{KEY}.name", detector.name, fix)


def held_out_metrics(detector: Detector, view: BatchView) -> dict[str, float]:
    """Rate of its verdicts, and how they compare with the grader's facts where there are any."""
    scores_B = checked_scores(detector, view)
    flagged_B = scores_B >= VERDICT
    metrics = {f"{PREFIX}/rate": float(flagged_B.double().mean())}
    if view.facts is not None and "hack" in view.facts:
        metrics[f"{PREFIX}/auroc"] = auroc(scores_B, view.facts["hack"])
        metrics |= {f"{PREFIX}/{name}": value for name, value in verdict_rates(flagged_B, view.facts["hack"]).items()}
    return metrics


def verdict_rates(flagged_B: Tensor, hack_B: Tensor) -> dict[str, float]:
    """Share of the hacks and of the other rollouts that are flagged; NaN where there are none of a kind."""
    flags, hacks = flagged_B.cpu() != 0, hack_B.cpu() > 0
    rates = {"recall": flags[hacks], "false_positive_rate": flags[~hacks]}
    return {name: float(rows.double().mean()) if len(rows) else math.nan for name, rows in rates.items()}
