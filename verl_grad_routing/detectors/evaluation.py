"""How well scores tell rollouts apart, against what the grader knows: for metrics alone, never for routing."""

from __future__ import annotations

import math

from sklearn.metrics import roc_auc_score
from torch import Tensor


def auroc(scores_B: Tensor, positives_B: Tensor) -> float:
    """Area under the ROC curve of ``scores_B`` for non-zero ``positives_B``; NaN when a class is missing."""
    positives = positives_B.detach().cpu().numpy() != 0
    if positives.all() or not positives.any():
        return math.nan
    return float(roc_auc_score(positives, scores_B.detach().cpu().numpy()))
