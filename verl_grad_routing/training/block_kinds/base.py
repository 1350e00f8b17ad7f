"""What blocks are made of, as the engine sees it: the engine knows this interface and no kind's name.

Shapes: B rollouts of a micro-batch, T its packed tokens, S the padded length.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tensordict import TensorDict
from torch import Tensor, nn
from torch.optim import Optimizer

from verl_grad_routing.config import BlocksConfig
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import Registry
from verl_grad_routing.routing import RoutingContext
from verl_grad_routing.training.block_step import BlockStep
from verl_grad_routing.training.hooks import EngineHook

if TYPE_CHECKING:
    from verl_grad_routing.training.checks.run import Run
    from verl_grad_routing.training.engine import RoutedFSDPEngine

ToTokens = Callable[[Tensor], Tensor | None]
"""Masks [N, 2] as ``masks.masks_of`` gives them to masks of tokens, [1, T, 2] or [B, S, 2]; ``None``: no effect."""


class BlockKind(ABC):
    """One kind of block. ``Config`` is ``BlocksConfig``; registered in ``BLOCK_KINDS``.

    Attributes:
        context: The masks of the tokens in flight, once the model is built.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type] = BlocksConfig
    layout_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the layout that a checkpoint must share with the run that resumes from it."""
    compares_gradients: ClassVar[bool] = True
    """Whether every parameter is of one block, so that gradients of methods in shadow can be compared by block."""

    def __init__(self, config: BlocksConfig):
        self.config = config
        self.context: RoutingContext

    @staticmethod
    def check(run: Run) -> None:
        """Refuse what this kind cannot do, before Ray starts. Raises ``UserError``."""
        del run

    def prepare(self, module: nn.Module, model_config: Any) -> nn.Module:
        """The base model before it is sharded, as verl has built it."""
        del model_config
        return module

    def add_adapters(self, module: nn.Module, model_config: Any) -> nn.Module:
        """Instead of verl's own adapter, where the run has one (``lora_rank`` above 0).

        Raises:
            UserError: This kind of blocks has no adapters.
        """
        del module
        raise UserError("actor_rollout_ref.model.lora_rank", model_config.lora_rank, f"set 0 with kind={self.name}")

    @abstractmethod
    def set_masks(self, micro_batch: TensorDict, masks: tuple[Tensor, Tensor], to_tokens: ToTokens) -> None:
        """Put the masks of a micro-batch into the context: ``masks.masks_of`` it, and what else its routes say."""

    @abstractmethod
    def build_step(
        self,
        module: nn.Module,
        build_optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        hooks: Sequence[EngineHook],
        actor_optim: Any,
    ) -> BlockStep:
        """The optimizer, one parameter group a block, and the step over both; ``actor_optim`` is verl's setting."""

    @abstractmethod
    def weights(self, engine: RoutedFSDPEngine, stock: Callable[..., tuple], **options: Any) -> tuple:
        """``(iterator of name and tensor, adapter configuration or None)`` for the rollout: ``exported_blocks`` only.

        Args:
            stock: verl's own export.
            options: What verl's own is called with.
        """

    @abstractmethod
    def layout(self, engine: RoutedFSDPEngine) -> dict[str, Any]:
        """What a checkpoint says of the blocks, as JSON values."""

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint with the layout ``saved`` for more than its ``layout_keys``. Raises ``UserError``."""
        del saved

    def limits(self, clip_norm: float) -> dict[str, float]:
        """Gradient norm limit of each block."""
        return {
            "deployed": self.config.clip_norm_deployed or clip_norm,
            "quarantine": self.config.clip_norm_quarantine or clip_norm,
        }


BLOCK_KINDS: Registry[BlockKind] = Registry("kind of blocks")

__all__ = ["BLOCK_KINDS", "BlockKind", "ToTokens"]
