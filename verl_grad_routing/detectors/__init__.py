"""Detectors: one score per rollout. ``DETECTORS`` maps name to class; importing this package registers our own."""

from verl_grad_routing.detectors import (  # noqa: F401  (each registers its detector)
    coinflip,
    concept_act,
    constant,
    grift,
    labels,
    linear_probe,
    monitor,
    oracle,
    persona_act,
    persona_permuted,
    random_direction,
)
from verl_grad_routing.detectors.activation import SCORE_PASSES, ActivationDetector
from verl_grad_routing.detectors.base import (
    DETECTORS,
    BatchView,
    Detector,
    NoConfig,
    Signal,
    checked_scores,
    view_for,
)
from verl_grad_routing.detectors.fingerprint import FingerprintDetector

__all__ = [
    "DETECTORS",
    "SCORE_PASSES",
    "ActivationDetector",
    "BatchView",
    "Detector",
    "FingerprintDetector",
    "NoConfig",
    "Signal",
    "checked_scores",
    "view_for",
]
