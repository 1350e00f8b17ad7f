"""Blocks that are neurons and heads of the base model itself: full-parameter training, no adapter."""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.optim import Optimizer

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import BLOCKS
from verl_grad_routing.routing.dense import (
    BlockParts,
    DenseBlocks,
    DenseContext,
    Shape,
    all_ablated,
    install_blocks,
)
from verl_grad_routing.training.block_kinds.base import BLOCK_KINDS, BlockKind, ToTokens
from verl_grad_routing.training.block_optim import DecayToStart, parameter_groups, step_options
from verl_grad_routing.training.dense_step import DenseStep
from verl_grad_routing.training.hooks import EngineHook
from verl_grad_routing.training.masks import activation_gradients_of

if TYPE_CHECKING:
    from verl_grad_routing.training.checks.run import Run
    from verl_grad_routing.training.engine import RoutedFSDPEngine


@BLOCK_KINDS.register("dense")
class DenseUnits(BlockKind):
    """The quarantine is ``blocks.units`` of the base model; everything else is deployed, or shared."""

    layout_keys = ("units", "shared")
    compares_gradients = False
    context: DenseContext

    @staticmethod
    def check(run: Run) -> None:
        model, settings = "actor_rollout_ref.model", run.settings
        for key, plain, reason in (
            (f"{model}.lora_rank", 0, "dense blocks train the base model itself; set 0"),
            ("grad_routing.blocks.form", "lora", "dense blocks have no adapters; leave lora"),
            (f"{model}.use_liger", False, "Liger's kernels bypass the routed layers; set false"),
            ("grad_routing.validate_swapped", False, "a model without its deployed block has no embeddings; set false"),
        ):
            value = run.get(key, plain)
            if value != plain:
                raise UserError(key, value, reason)
        if settings.blocks.hooks:
            fix = "engine hooks act on adapters; leave it empty with blocks.kind=dense"
            raise UserError("grad_routing.blocks.hooks", list(settings.blocks.hooks), fix)
        if run.reads_fingerprints:
            fix = "gradient fingerprints are taken from models with adapters; choose another detector"
            raise UserError("grad_routing.detector.name", settings.detector["name"], fix)
        if run.reads_activations and getattr(run.methods.detector.config, "score_pass", "auto") == "reference":
            fix = "without adapters no pass of the actor is the base model's; set auto, policy or ablated"
            raise UserError("grad_routing.detector.score_pass", "reference", fix)
        if run.shape:
            resolved(settings.blocks.units, Shape.of(run.shape, str(run.get(f"{model}.path"))))

    def prepare(self, module: nn.Module, model_config: Any) -> nn.Module:
        self.blocks = resolved(self.config.units, Shape.of(model_config.hf_config.to_dict()))
        self.context = install_blocks(module, self.blocks)
        return module

    def set_masks(self, micro_batch: TensorDict, masks: tuple[Tensor, Tensor], to_tokens: ToTokens) -> None:
        gate_N2, update_N2 = masks
        weights_N2 = activation_gradients_of(micro_batch)
        if weights_N2 is None:
            weights_N2 = torch.ones_like(gate_N2)
        shared_N2 = update_N2.amax(dim=1, keepdim=True).expand(-1, 2)
        self.context.set_all(*(to_tokens(mask_N2) for mask_N2 in (gate_N2, update_N2, weights_N2, shared_N2)))

    def build_step(
        self,
        module: nn.Module,
        build_optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        hooks: Sequence[EngineHook],
        actor_optim: Any,
    ) -> DenseStep:
        parts = BlockParts(dict(module.named_parameters()), self.blocks.role)
        optim = self.config.optim
        optimizer = build_optimizer(parameter_groups(parts.blocks, optim, actor_optim))
        limits = self.limits(actor_optim.clip_grad)
        limits["shared"] = max(limits.values())
        decay = DecayToStart.of(parts.blocks, optim, actor_optim)
        return DenseStep(optimizer, parts, limits, **step_options(optim, decay))

    def weights(self, engine: RoutedFSDPEngine, stock: Callable[..., tuple], **options: Any) -> tuple:
        tensors, configuration = stock(**options)
        if len(engine.exported_blocks) == len(BLOCKS):
            return tensors, configuration
        if engine.exported_blocks != ("deployed",):
            raise UserError("exported blocks", engine.exported_blocks, "dense blocks export both, or deployed alone")
        return all_ablated(tensors, self.blocks), configuration

    def layout(self, engine: RoutedFSDPEngine) -> dict[str, Any]:
        layout, expansion = self.blocks.as_layout(), self.blocks.expansion
        shared = layout.pop("shared")
        return {
            "kind": self.name,
            "units": layout,
            "shared": shared,
            "ablate_at_deployment": self.config.ablate_at_deployment,
            "base_model": str(engine.model_config.path),
            "start": {"decay_to_start": self.config.optim.decay_to_start},
            "expansion": None if expansion is None else expansion.as_record(),
        }

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        now, before = self.config.optim.decay_to_start, saved.get("start", {}).get("decay_to_start", False)
        if now != before:
            fix = f"the checkpoint's run has {before}; set the same or start a new run"
            raise UserError("grad_routing.blocks.optim.decay_to_start", now, fix)


def resolved(units: Any, shape: Shape) -> DenseBlocks:
    """``units.resolve(shape)`` with errors that name the configuration's keys."""
    try:
        return units.resolve(shape)
    except UserError as error:
        raise UserError(f"grad_routing.blocks.units.{error.key}", error.value, error.fix) from None
