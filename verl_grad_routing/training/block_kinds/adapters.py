"""Blocks that are PEFT adapters over a frozen base model."""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.optim import Optimizer
from verl.utils.py_functional import convert_to_regular_types

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import (
    add_blocks,
    block_of,
    block_parameters,
    check_ranks,
    check_total_rank,
    get_form,
    initialisation_report,
    load_contrast,
)
from verl_grad_routing.training import export
from verl_grad_routing.training.block_kinds.base import BLOCK_KINDS, BlockKind, ToTokens
from verl_grad_routing.training.block_optim import (
    DecayToStart,
    check_same_start,
    parameter_groups,
    start_signature,
    step_options,
)
from verl_grad_routing.training.block_step import BlockStep
from verl_grad_routing.training.hooks import EngineHook

if TYPE_CHECKING:
    from verl_grad_routing.training.checks.run import Run
    from verl_grad_routing.training.engine import RoutedFSDPEngine


@BLOCK_KINDS.register("adapters")
class AdapterBlocks(BlockKind):
    """Two adapters per linear layer, ``default`` (deployed) and ``quarantine``."""

    layout_keys = ("deployed_rank", "quarantine_rank", "scaling", "target_modules")

    @staticmethod
    def check(run: Run) -> None:
        blocks = run.settings.blocks
        check_ranks(blocks.deployed_rank, blocks.quarantine_rank)
        try:
            sides = get_form(blocks.form).sides
        except UserError as error:
            raise UserError("grad_routing.blocks.form", error.value, error.fix) from None
        total = run.get("actor_rollout_ref.model.lora_rank")
        if total != blocks.adapter_rank:
            what = "the sum of both blocks' ranks" if sides == 1 else f"{sides} times the sum of both blocks' ranks"
            fix = f"must be {what}, {blocks.adapter_rank}; leave it to the preset"
            raise UserError("actor_rollout_ref.model.lora_rank", total, fix)
        check_total_rank(blocks.total_rank, sides)
        if run.methods.intervention.table.weighs_activations:
            fix = "adapters have no units whose gradients could be weighed; set grad_routing.blocks.kind=dense"
            raise UserError("grad_routing.intervention.name", run.settings.intervention["name"], fix)

    def add_adapters(self, module: nn.Module, model_config: Any) -> nn.Module:
        blocks = self.config
        base_dtype = next(module.parameters()).dtype
        module, self.context = add_blocks(
            module,
            deployed_rank=blocks.deployed_rank,
            quarantine_rank=blocks.quarantine_rank,
            scaling=model_config.lora_alpha / blocks.adapter_rank,
            target_modules=convert_to_regular_types(model_config.target_modules),
            exclude_modules=convert_to_regular_types(model_config.exclude_modules),
            init=blocks.init,
            form=blocks.form,
            seed=blocks.seed,
            contrast=None if blocks.contrast is None else load_contrast(blocks.contrast),
        )
        if torch.distributed.get_rank() == 0:  # the others have no weights yet
            form = "" if blocks.form == "lora" else f", form {blocks.form}"
            print(f"blocks: init {blocks.init}{form}, {initialisation_report(module)}")
        for name, parameter in module.named_parameters():
            if block_of(name) is not None:
                parameter.data = parameter.data.to(base_dtype)  # FSDP wants one dtype in a unit, as verl's LoRA does
        return module

    def set_masks(self, micro_batch: TensorDict, masks: tuple[Tensor, Tensor], to_tokens: ToTokens) -> None:
        del micro_batch
        self.context.set(*(to_tokens(mask_N2) for mask_N2 in masks))

    def build_step(
        self,
        module: nn.Module,
        build_optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        hooks: Sequence[EngineHook],
        actor_optim: Any,
    ) -> BlockStep:
        blocks, optim = block_parameters(module), self.config.optim
        optimizer = build_optimizer(parameter_groups(blocks, optim, actor_optim))
        named = {name: p for name, p in module.named_parameters() if block_of(name) is not None and p.requires_grad}
        for hook in hooks:
            hook.bind(named)
            hook.attach(module)
        limits, decay = self.limits(actor_optim.clip_grad), DecayToStart.of(blocks, optim, actor_optim)
        return BlockStep(optimizer, blocks, limits, hooks, **step_options(optim, decay))

    def weights(self, engine: RoutedFSDPEngine, stock: Callable[..., tuple], **options: Any) -> tuple:
        if engine.model_config.lora.get("merge", False):
            return export.merged(engine, stock), None
        if not options.get("base_sync_done", False):
            return stock(**options)
        return export.adapter(engine)

    def layout(self, engine: RoutedFSDPEngine) -> dict[str, Any]:
        blocks, targets = self.config, engine.module.peft_config["default"].target_modules
        return {
            "deployed_rank": blocks.deployed_rank,
            "quarantine_rank": blocks.quarantine_rank,
            "scaling": engine.scaling,
            "init": blocks.init,
            "form": blocks.form,
            "start": start_signature(blocks),
            "ablate_at_deployment": blocks.ablate_at_deployment,
            "base_model": str(engine.model_config.path),
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
        }

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        form = saved.get("form", "lora")
        if form != self.config.form:
            fix = f"the checkpoint's blocks are of the form {form}; set the same or start a new run"
            raise UserError("grad_routing.blocks.form", self.config.form, fix)
        check_same_start(saved, self.config)
