"""How far two methods agree about the rollouts of a batch, and how much of what is learned one of them takes away.

For metrics alone. Shapes: B rollouts, R response tokens.
"""

from __future__ import annotations

import math
import warnings

from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score
from torch import Tensor


def rank_correlation(ours_B: Tensor, theirs_B: Tensor) -> float:
    """Spearman's correlation of two scores, ties ranked by their mean; NaN when one of them is constant."""
    if any(bool((scores == scores[0]).all()) for scores in (ours_B, theirs_B)):
        return math.nan
    return float(spearmanr(ours_B.cpu().numpy(), theirs_B.cpu().numpy()).statistic)  # pyright: ignore


def overlap(ours_B: Tensor, theirs_B: Tensor) -> float:
    """Jaccard index of two sets of rollouts (bool): both / either; NaN when both are empty."""
    either = int((ours_B | theirs_B).sum())
    return int((ours_B & theirs_B).sum()) / either if either else math.nan


def kappa(ours_B: Tensor, theirs_B: Tensor) -> float:
    """Cohen's kappa: agreement beyond what the two shares give by chance; NaN when both verdicts are constant."""
    if bool((ours_B == ours_B[0]).all()) and bool((theirs_B == theirs_B[0]).all()):
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of the two is constant: kappa is 0
        return float(cohen_kappa_score(ours_B.cpu().numpy(), theirs_B.cpu().numpy()))


def verdict_agreement(ours_B: Tensor, theirs_B: Tensor) -> dict[str, float]:
    """Agreement of two sets of rollouts (bool [B]), as the metrics name it."""
    return {
        "overlap": overlap(ours_B, theirs_B),
        "agreement": float((ours_B == theirs_B).double().mean()),
        "kappa": kappa(ours_B, theirs_B),
        "share_flagged": float(theirs_B.double().mean()),
    }


def mass_discarded(plain_BR: Tensor, taught_BR: Tensor, update_B: Tensor) -> float:
    """The share of ``sum |A|`` that does not reach what is deployed in its direction any more; NaN without any mass.

    Of a token's plain advantage A, ``min(max(sign(A) A' u, 0), |A|)`` is left: nothing where the advantage A' under the
    method is masked, of the other sign, or trains only what is deleted (u = 0); all of it where A' is A or larger.

    Args:
        plain_BR: Advantages without any method, 0 where no token counts.
        taught_BR: Those under the method, 0 where it took the token out.
        update_B: Its update mask of the deployed block.
    """
    plain, taught = plain_BR.double(), taught_BR.double() * update_B.double()[:, None]
    mass = float(plain.abs().sum())
    left = (plain.sign() * taught).clamp(min=0).minimum(plain.abs())
    return 1 - float(left.sum()) / mass if mass > 0 else math.nan
