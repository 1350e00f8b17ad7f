"""The kinds of blocks that ship, registered: ``BLOCK_KINDS`` maps ``grad_routing.blocks.kind`` to a class."""

from __future__ import annotations

from verl_grad_routing.training.block_kinds import adapters, dense  # noqa: F401  (importing registers them)
from verl_grad_routing.training.block_kinds.base import BLOCK_KINDS, BlockKind

__all__ = ["BLOCK_KINDS", "BlockKind"]
