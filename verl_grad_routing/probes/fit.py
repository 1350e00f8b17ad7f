"""Fitting: logistic regression on standardised activations, threshold on rollouts of prompts it has not seen.

The probe of 'Steering RL training: benchmarking interventions against reward hacking' is one: response-mean
activations of one layer, threshold at 5% false positives. Shapes: N rollouts, F = L * d features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_grad_routing.detectors.probe_file import LinearProbe
from verl_grad_routing.directions.checks import require_number
from verl_grad_routing.errors import UserError

MIN_HELD_OUT = 2  # rollouts of each kind


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        false_positive_rate: Largest share of held-out clean rollouts above the threshold (the post: 0.05).
        held_out: Share of the prompts that judge and do not train.
        c: Inverse strength of the L2 penalty (scikit-learn's ``C``).
        seed: Of the split.
    """

    false_positive_rate: float = 0.05
    held_out: float = 0.3
    c: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_number("--fpr", self.false_positive_rate, 0, 1)
        require_number("--c", self.c, 0)
        if self.c == 0:
            raise UserError("--c", self.c, "give a positive number")
        if not 0 < self.held_out < 1:
            raise UserError("--held-out", self.held_out, "give a share between 0 and 1")


def fit_probe(
    pooled_NLd: Tensor,
    unwanted: Sequence[bool],
    groups: Sequence[Any],
    settings: FitSettings,
    *,
    layers: tuple[int, ...],
    position: str,
    origin: str,
    data_hash: str,
    model_hash: str,
) -> LinearProbe:
    """Fit on most prompts, choose the threshold on the others.

    Args:
        pooled_NLd: Pooled activations.
        unwanted: Label of each rollout.
        groups: What must not be on both sides of the split: each rollout's prompt.
        settings: See there.
        layers, position, origin, data_hash, model_hash: As in ``LinearProbe``.

    Raises:
        UserError: Too few prompts or rollouts of one kind on a side of the split.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupShuffleSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features_NF = pooled_NLd.flatten(1).double().numpy()
    labels_N = np.asarray(unwanted, dtype=bool)
    numbers: dict[Any, int] = {}
    group_N = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    if group_N.max() < 1:
        raise UserError("ROLLOUTS", 1, "all rollouts are of one prompt; held-out prompts are needed")
    splitter = GroupShuffleSplit(n_splits=1, test_size=settings.held_out, random_state=settings.seed)
    fitted, held = next(splitter.split(features_NF, labels_N, group_N))
    for rows, where in ((fitted, "to fit"), (held, "held out")):
        least = min(int(labels_N[rows].sum()), int((~labels_N[rows]).sum()))
        if least < MIN_HELD_OUT:
            fix = f"only {least} rollouts of one kind are {where}; give more rollouts or another --held-out or --seed"
            raise UserError("ROLLOUTS", len(labels_N), fix)
    scaler = StandardScaler()
    regression = LogisticRegression(C=settings.c, max_iter=5000)
    make_pipeline(scaler, regression).fit(features_NF[fitted], labels_N[fitted])
    mean_F, scale_F = np.asarray(scaler.mean_), np.asarray(scaler.scale_)
    weights_F = regression.coef_[0] / scale_F
    bias = float(np.ravel(regression.intercept_)[0] - weights_F @ mean_F)
    logits = features_NF[held] @ weights_F + bias
    clean, bad = logits[~labels_N[held]], logits[labels_N[held]]
    threshold = threshold_at(clean, settings.false_positive_rate)
    report = {
        "rollouts": len(labels_N),
        "unwanted": int(labels_N.sum()),
        "prompts": int(group_N.max()) + 1,
        "held_out": len(held),
        "held_out_auroc": float(roc_auc_score(labels_N[held], logits)),
        "held_out_false_positive_rate": float((clean > threshold).mean()),
        "held_out_recall": float((bad > threshold).mean()),
        **vars(settings),
    }
    weights_Ld = torch.from_numpy(weights_F.reshape(pooled_NLd.shape[1:]))
    return LinearProbe(weights_Ld, bias, threshold, layers, position, origin, data_hash, model_hash, report)


def threshold_at(clean_logits: np.ndarray, rate: float) -> float:
    """The least observed logit that at most ``rate`` of the clean ones exceed (strictly)."""
    ordered = np.sort(clean_logits)
    allowed = math.floor(rate * len(ordered) + 1e-9)
    return float(ordered[max(len(ordered) - allowed - 1, 0)])
