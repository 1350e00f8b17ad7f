"""Dedicated neurons and heads of the base model as blocks: the same masks on rows and columns of ordinary weights.

The names are loaded on first use, so that a configuration can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_grad_routing.routing.dense.ablate import ablated, all_ablated
    from verl_grad_routing.routing.dense.expansion import EXPANDED, Expansion
    from verl_grad_routing.routing.dense.install import DenseContext, install_blocks
    from verl_grad_routing.routing.dense.kernel import TokenSets, scaled_gradient, token_weight, unit_linear
    from verl_grad_routing.routing.dense.parts import BlockParts
    from verl_grad_routing.routing.dense.resize import narrowed, widened
    from verl_grad_routing.routing.dense.units import SHARED, DenseBlocks, Role, Shape, UnitsConfig

_MODULES = {
    "ablate": "ablated all_ablated",
    "expansion": "EXPANDED Expansion",
    "install": "DenseContext install_blocks",
    "kernel": "TokenSets scaled_gradient token_weight unit_linear",
    "parts": "BlockParts",
    "resize": "narrowed widened",
    "units": "SHARED DenseBlocks Role Shape UnitsConfig",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [  # noqa: RUF022 (by module)
    "ablated",
    "all_ablated",
    "EXPANDED",
    "Expansion",
    "DenseContext",
    "install_blocks",
    "TokenSets",
    "scaled_gradient",
    "token_weight",
    "unit_linear",
    "BlockParts",
    "narrowed",
    "widened",
    "SHARED",
    "DenseBlocks",
    "Role",
    "Shape",
    "UnitsConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
