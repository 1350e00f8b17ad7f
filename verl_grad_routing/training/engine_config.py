"""verl's FSDP engine configuration with the blocks in it; the ``_target_`` of ``actor.fsdp_config`` in every preset."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import FSDPEngineConfig


@dataclass
class RoutedFSDPEngineConfig(FSDPEngineConfig):
    """verl's, with the two blocks.

    Attributes:
        blocks: The mapping ``grad_routing.blocks``; see ``config.BlocksConfig`` for its keys and their errors.
    """

    blocks: dict[str, Any] = field(default_factory=dict)
