"""Which responses are learned from, and what the choice did, told in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from verl_grad_routing.detectors.evaluation import auroc, verdict_metrics
from verl_grad_routing.errors import UserError
from verl_grad_routing.rejection.sample import Sample, shuffled
from verl_grad_routing.rejection.settings import Rft


def choose(settings: Rft, correct: Sequence[Sample], scores: Sequence[float] | None) -> list[int]:
    """Row numbers of ``correct`` that are learned from, best first.

    ``grift`` takes those with a score of at most 0.5, lowest first, up to ``keep``; equal ones in the data's order.
    ``permuted`` takes as many by the same scores in random order, ``none`` the first ``keep``.

    Raises:
        UserError: None is left.
    """
    if settings.filter == "none":
        rows = list(range(len(correct)))
    else:
        assert scores is not None
        by = shuffled(scores, settings.seed) if settings.filter == "permuted" else list(scores)
        rows = sorted((row for row, score in enumerate(by) if score <= 0.5), key=lambda row: (by[row], row))
    if not rows:
        raise UserError("--filter", settings.filter, "no response is left to learn from")
    return rows[: settings.keep]


def report(
    settings: Rft,
    samples: Sequence[Sample],
    correct: Sequence[Sample],
    scores: Sequence[float] | None,
    kept: Sequence[int],
) -> dict[str, Any]:
    """Counts, and what the grader's facts say of them where the reward function returned any: read by you alone."""
    found: dict[str, Any] = {
        "filter": settings.filter,
        "samples": len(samples),
        "correct": len(correct),
        "kept": len(kept),
    }
    if scores is not None:
        found["predicted_clean"] = sum(score <= 0.5 for score in scores)
    rows = {"samples": list(samples), "correct": list(correct), "kept": [correct[row] for row in kept]}
    for fact in ("hack", "solve"):
        if all(fact in one.facts for one in samples):
            found |= {
                f"{fact}_{name}": sum(one.facts[fact] > 0 for one in part) / len(part) for name, part in rows.items()
            }
    if scores is not None and all("hack" in one.facts for one in correct):
        scores_B = torch.tensor(list(scores), dtype=torch.float64)
        hack_B = torch.tensor([one.facts["hack"] for one in correct], dtype=torch.float64)
        measures = {"auroc": auroc(scores_B, hack_B), **verdict_metrics("grift", scores_B > 0.5, hack_B, settings.seed)}
        found |= {key.removeprefix("grift/"): None if math.isnan(value) else value for key, value in measures.items()}
    return found
