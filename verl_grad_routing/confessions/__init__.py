"""Confessions (arXiv 2512.08093): after some answers the model is asked how it came to them, and rewarded for honesty.

No verl in here: settings, the two formats, judges, who confesses, and what is reported.
"""

from __future__ import annotations

from verl_grad_routing.confessions.draw import Draw, draw
from verl_grad_routing.confessions.formats import FORMATS, Format
from verl_grad_routing.confessions.judges import Judge, build_judge, judged, visible
from verl_grad_routing.confessions.measures import Confession, confession_metrics, rejection_metrics
from verl_grad_routing.confessions.request import prefix, request_tokens
from verl_grad_routing.confessions.settings import GT_JUDGE, ConfessionsConfig

__all__ = [
    "FORMATS",
    "GT_JUDGE",
    "Confession",
    "ConfessionsConfig",
    "Draw",
    "Format",
    "Judge",
    "build_judge",
    "confession_metrics",
    "draw",
    "judged",
    "prefix",
    "rejection_metrics",
    "request_tokens",
    "visible",
]
