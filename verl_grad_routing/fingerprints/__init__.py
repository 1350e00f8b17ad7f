"""Per-rollout gradients of a frozen probe and their random projections: exact, streamed, the same on every machine.

A *probe* is a low-rank adapter on chosen linear layers that is never trained: its up-projection B is zero, so the model
is as it was and the gradient of B is the one gradient there is. Nothing here knows a method or verl.
"""

from verl_grad_routing.fingerprints.clusters import Clusters, match, nearest, soft_scores, two_clusters
from verl_grad_routing.fingerprints.per_sample import (
    GradientTaps,
    packed_spans,
    padded_spans,
    per_sample_gradients,
)
from verl_grad_routing.fingerprints.probe import GradientProbe, probed_modules, smallest_cosine_layers
from verl_grad_routing.fingerprints.sketch import Fingerprints, sketch

__all__ = [
    "Clusters",
    "Fingerprints",
    "GradientProbe",
    "GradientTaps",
    "match",
    "nearest",
    "packed_spans",
    "padded_spans",
    "per_sample_gradients",
    "probed_modules",
    "sketch",
    "smallest_cosine_layers",
    "soft_scores",
    "two_clusters",
]
