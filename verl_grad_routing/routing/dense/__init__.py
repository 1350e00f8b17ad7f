"""Dedicated neurons and heads of the base model as blocks: the same masks on rows and columns of ordinary weights."""

from __future__ import annotations

from verl_grad_routing.routing.dense.ablate import ablated, all_ablated
from verl_grad_routing.routing.dense.install import DenseContext, install_blocks
from verl_grad_routing.routing.dense.kernel import scaled_gradient, token_weight, unit_linear
from verl_grad_routing.routing.dense.parts import BlockParts
from verl_grad_routing.routing.dense.units import SHARED, DenseBlocks, Role, Shape, UnitsConfig

__all__ = [
    "SHARED",
    "BlockParts",
    "DenseBlocks",
    "DenseContext",
    "Role",
    "Shape",
    "UnitsConfig",
    "ablated",
    "all_ablated",
    "install_blocks",
    "scaled_gradient",
    "token_weight",
    "unit_linear",
]
