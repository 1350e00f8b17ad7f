"""A few numbers per linear layer that say what a rollout does there: coordinates of its activations and gradients.

Every chosen layer gets a frozen *bottleneck* of rank r, a read basis A and a write basis B, as a low-rank adapter
``y = W x + B (c ⊙ A x)`` has them. ``A x`` are the coordinates of an activation; the gradient of the gate c at c = 0 is
the coordinates of a gradient. Nothing is installed and the model is as it was. Nothing here knows a method or verl.
"""

from verl_grad_routing.bottleneck.basis import (
    BASES,
    Bottleneck,
    ModuleBasis,
    bases_of,
    digest,
    register_basis,
)
from verl_grad_routing.bottleneck.coordinates import (
    KeptCoordinates,
    ProjectedCoordinates,
    bottleneck_gradients,
    cosines,
)

__all__ = [
    "BASES",
    "Bottleneck",
    "KeptCoordinates",
    "ModuleBasis",
    "ProjectedCoordinates",
    "bases_of",
    "bottleneck_gradients",
    "cosines",
    "digest",
    "register_basis",
]
