"""The three places where a method may reach into the engine's step, beyond the two masks.

``extra_loss`` before backward (an L1 penalty), ``transform_gradients`` after the data-parallel reduction and before
clipping (a projection of the gradient), ``transform_update`` after the optimizer's step (a projection of the update).
Gradients and parameters are DTensors: a hook works on local shards and reduces what it must itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from verl_grad_routing.registry import Registry

Blocks = Mapping[str, list[torch.nn.Parameter]]


class EngineHook:
    """One method's reach into the step; every part is optional. ``Config`` is a frozen dataclass.

    Class attributes:
        recomputes: It asks for gradients at other weights than the step's. Old log-probs must then be numbers that
            were fixed before the update, so KEEP rollouts get a pass of their own for them.
        plain_lora: It counts on ``dW = s B A`` with A and B as the parameters; other forms of blocks are refused.

    Attributes:
        metrics: What the last step is reported with, as ``routing/{name}/{key}``.
    """

    name: ClassVar[str] = ""
    recomputes: ClassVar[bool] = False
    plain_lora: ClassVar[bool] = False
    Config: ClassVar[type]

    def __init__(self, config: Any):
        self.config = config
        self.metrics: dict[str, float] = {}

    def check(self, model: str) -> None:
        """Refuse what cannot work with this base model, before Ray starts. Raises ``UserError``."""

    def bind(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Called once, with both blocks' parameters (DTensors) by their names in the PEFT model."""

    def attach(self, model: torch.nn.Module) -> None:
        """Called once with the adapted, sharded model, for a hook that listens to its layers."""

    def begin(
        self, micro_batch: Any, beside: Callable[[Sequence[Tensor]], Tensor] | None, *, again: bool = False
    ) -> None:
        """Called before every forward pass.

        Args:
            micro_batch: Its rows.
            beside: Puts token values, one ``[length, 2]`` a row, beside the inputs as masks are: ``[1, T, 2]`` packed
                (this rank's part of the sequence) or ``[B, S, 2]`` padded, zero where there is no token. ``None`` in a
                pass that does not train.
            again: A mini-batch's gradients are computed once more, see ``transform_gradients``.
        """

    def extra_loss(self, engine: Any, model_output: Mapping[str, Any], micro_batch: Any) -> Tensor | None:
        """A scalar to add to the micro-batch's loss, normalised over the global mini-batch by the hook itself.

        FSDP averages gradients over ranks, so multiply by the batch's ``dp_size``, as verl's losses do.
        ``model_output`` holds ``log_probs`` and, where it was asked for, ``entropy``, with their graphs.
        """
        return None

    def transform_gradients(self, blocks: Blocks, recompute: Callable[[], None]) -> None:
        """Change ``.grad`` of the blocks' parameters in place, before clipping; ``None`` or 0 in one without mass.

        ``recompute()`` replaces every ``.grad`` by the same mini-batch's at the parameters as they are then. All ranks
        must call it equally often.
        """

    def transform_update(self, blocks: Blocks, before: Mapping[str, list[Tensor]]) -> None:
        """Change the parameters in place after the step; ``before`` holds their local shards before it."""


ENGINE_HOOKS: Registry[EngineHook] = Registry("engine hook")


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
