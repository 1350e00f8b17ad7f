"""The engine hooks that ship, registered; import this and not ``hooks`` where they are looked up by name."""

from __future__ import annotations

from verl_grad_routing.training import (  # noqa: F401  (importing registers them)
    l1_activations,
    project_update,
    regularize_gradient,
)
from verl_grad_routing.training.hooks import ENGINE_HOOKS

__all__ = ["ENGINE_HOOKS"]
