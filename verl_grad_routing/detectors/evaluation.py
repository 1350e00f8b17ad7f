"""How well scores tell rollouts apart, against what the grader knows: for metrics alone, never for routing."""

from __future__ import annotations

import math

import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

PERMUTATIONS = 50


def auroc(scores_B: Tensor, positives_B: Tensor) -> float:
    """Area under the ROC curve of ``scores_B`` for non-zero ``positives_B``; NaN when a class is missing."""
    positives = positives_B.detach().cpu().numpy() != 0
    if positives.all() or not positives.any():
        return math.nan
    return float(roc_auc_score(positives, scores_B.detach().cpu().numpy()))


def f1(flags_P: Tensor, positives_P: Tensor) -> float:
    """F1 of the class of non-zero ``positives_P``; NaN when the rollouts have only one class."""
    positives = positives_P.detach().cpu().numpy() != 0
    if positives.all() or not positives.any():
        return math.nan
    flags = flags_P.detach().cpu().numpy() != 0
    return float(f1_score(positives, flags, zero_division=0))  # pyright: ignore[reportArgumentType]


def permuted_f1(flags_P: Tensor, positives_P: Tensor, seed: int, draws: int = PERMUTATIONS) -> float:
    """The control for ``f1``: its mean over random permutations of the labels, which is what chance gives."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(positives_P), generator=generator) for _ in range(draws)]
    return math.fsum(f1(flags_P, positives_P[order]) for order in orders) / draws


def f1_rates(flags_B: Tensor, hack_B: Tensor) -> dict[str, float]:
    """F1 of both classes, and what chance gives: the expected ``f1_hack`` when the facts are permuted.

    With F flags, H hacks and N rollouts that is ``2 F H / (N (F + H))``, exactly. NaN where there is only one class.
    """
    flagged, hacks, count = int((flags_B != 0).sum()), int((hack_B > 0).sum()), len(hack_B)
    both = 0 < hacks < count
    chance = 2 * flagged * hacks / (count * (flagged + hacks)) if both else math.nan
    return {"f1_hack": f1(flags_B, hack_B > 0), "f1_clean": f1(flags_B == 0, hack_B <= 0), "chance_f1": chance}


def verdict_metrics(name: str, flags_P: Tensor, hack_P: Tensor, seed: int) -> dict[str, float]:
    """F1 of both classes, and the label-permutation control, of verdicts on the rollouts that were judged."""
    return {
        f"{name}/f1_hack": f1(flags_P, hack_P),
        f"{name}/f1_clean": f1(~flags_P, hack_P == 0),
        f"{name}/permuted_f1": permuted_f1(flags_P, hack_P, seed),
    }
