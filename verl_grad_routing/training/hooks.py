"""The three places where a method may reach into the engine's step, beyond the two masks.

``extra_loss`` before backward (an L1 penalty), ``transform_gradients`` after the data-parallel reduction and before
clipping (a projection of the gradient), ``transform_update`` after the optimizer's step (a projection of the update).
Gradients and parameters are DTensors: a hook works on local shards and reduces what it must itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.registry import Registry

Blocks = Mapping[str, list[torch.nn.Parameter]]


class EngineHook:
    """One method's reach into the step; every part is optional. ``Config`` is a frozen dataclass."""

    name: ClassVar[str] = ""
    Config: ClassVar[type]

    def __init__(self, config: Any):
        self.config = config

    def extra_loss(self, engine: Any, model_output: Mapping[str, Any], micro_batch: Any) -> Tensor | None:
        """A scalar to add to the micro-batch's loss, normalised over the global mini-batch by the hook itself.

        FSDP averages gradients over ranks, so multiply by the batch's ``dp_size``, as verl's losses do.
        ``model_output`` holds ``log_probs`` and, where it was asked for, ``entropy``, with their graphs.
        """
        return None

    def transform_gradients(self, blocks: Blocks) -> None:
        """Change ``.grad`` of the blocks' parameters in place, before clipping; ``None`` in a block without mass."""

    def transform_update(self, blocks: Blocks, before: Mapping[str, list[Tensor]]) -> None:
        """Change the parameters in place after the step; ``before`` holds their local shards before it."""


ENGINE_HOOKS: Registry[EngineHook] = Registry("engine hook")
