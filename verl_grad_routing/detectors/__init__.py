"""Detectors: one score per rollout. ``DETECTORS`` maps name to class; importing this package registers our own."""

from verl_grad_routing.detectors import (  # noqa: F401  (each registers its detector)
    classifier,
    coinflip,
    concept_act,
    constant,
    grift,
    labels,
    linear_probe,
    monitor,
    oracle,
    persona_act,
    persona_grad,
    persona_permuted,
    random_direction,
    random_grad,
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
from verl_grad_routing.detectors.gradient import GradientDetector
from verl_grad_routing.detectors.tokens import TokenDetector, checked_token_scores

__all__ = [
    "DETECTORS",
    "SCORE_PASSES",
    "ActivationDetector",
    "BatchView",
    "Detector",
    "FingerprintDetector",
    "GradientDetector",
    "NoConfig",
    "Signal",
    "TokenDetector",
    "checked_scores",
    "checked_token_scores",
    "view_for",
]
