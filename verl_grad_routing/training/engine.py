"""The engine that executes masks: verl's FSDP2 engine with two blocks and no knowledge of any method.

Shapes: B rollouts of a micro-batch, T its packed tokens (after sequence-parallel slicing), S the padded length.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.py_functional import convert_to_regular_types
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_grad_routing.config import BlocksConfig
from verl_grad_routing.directions import PoolPlan, position_mask
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import build_config, load_external_methods
from verl_grad_routing.routing import (
    BLOCKS,
    RoutingContext,
)
from verl_grad_routing.training import reference_cpu  # noqa: F401  (verl's own engines on machines without accelerator)
from verl_grad_routing.training.block_kinds import BLOCK_KINDS, BlockKind
from verl_grad_routing.training.bottleneck_step import bottleneck_step, gradients_asked
from verl_grad_routing.training.confession_loss import with_confessions
from verl_grad_routing.training.engine_hooks import ENGINE_HOOKS
from verl_grad_routing.training.fingerprint_step import fingerprint_step, gradient_probe
from verl_grad_routing.training.masks import masks_of, routing_table
from verl_grad_routing.training.mass import Mass, block_mass
from verl_grad_routing.training.own_gate import CURRENT, with_current_log_probs
from verl_grad_routing.training.placing import mask_beside, values_beside
from verl_grad_routing.training.probe import ActivationProbe

STRATEGY = "routed_fsdp2"
LAYOUT_FILE = "grad_routing_blocks.json"


@EngineRegistry.register(model_type="language_model", backend=STRATEGY, device=["cuda", "npu", "cpu"])
class RoutedFSDPEngine(FSDPEngineWithLMHead):
    """verl's language-model engine whose trained parameters are two blocks, of the kind ``blocks.kind``.

    A batch that trains carries ``route`` (B,) and the non-tensor ``routing_table`` (``masks`` says what else it may
    have); the engine turns them into token masks beside the packed inputs. Inference batches may carry them too (for
    KEEP's forward gate), ask for activations (``probe``) or for the quarantine-ablated model (``ablate_quarantine``).
    """

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any):
        load_external_methods()
        settings = convert_to_regular_types(engine_config.blocks)
        self.blocks_config: BlocksConfig = build_config(BlocksConfig, settings, "grad_routing.blocks")
        self.kind: BlockKind = BLOCK_KINDS[self.blocks_config.kind](self.blocks_config)
        self.hooks = [ENGINE_HOOKS.build(hook, "grad_routing.blocks.hooks") for hook in self.blocks_config.hooks]
        self.exported_blocks: tuple[str, ...] = tuple(BLOCKS)
        self._mass: Mass | None = None
        self._again = False
        self._gradients_anew: Callable[[], None] | None = None
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    # ---- building ----

    @property
    def scaling(self) -> float:
        """alpha / r of the joined adapter, the same for both blocks."""
        return self.model_config.lora_alpha / self.blocks_config.adapter_rank

    @property
    def context(self) -> RoutingContext:
        """The masks of the tokens in flight."""
        return self.kind.context

    def _build_module(self) -> torch.nn.Module:
        return self.kind.prepare(super()._build_module(), self.model_config)

    def _build_lora_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return self.kind.add_adapters(module, self.model_config)

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        with self._as_fsdp2():
            module = super()._build_fsdp_module(module)
        if self.scaler is not None:
            raise UserError("actor.fsdp_config.mixed_precision.param_dtype", "fp16", "use bf16 or fp32 with blocks")
        self.probe = ActivationProbe(module)
        return module

    @contextmanager
    def _as_fsdp2(self) -> Iterator[None]:
        """verl branches on the strategy's name; ours is fsdp2 in everything that it decides."""
        object.__setattr__(self.engine_config, "strategy", "fsdp2")
        try:
            yield
        finally:
            object.__setattr__(self.engine_config, "strategy", STRATEGY)

    def _build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        from verl.workers.config.optimizer import build_optimizer

        build = partial(build_optimizer, config=self.optimizer_config)
        self.block_step = self.kind.build_step(module, build, self.hooks, self.optimizer_config)
        return self.block_step.optimizer

    # ---- masks ----

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        self._set_masks(micro_batch, model_inputs)
        trains = torch.is_grad_enabled() and not self._asks_for_gradients(micro_batch)
        for hook in self.hooks:
            beside = partial(values_beside, self, micro_batch, model_inputs) if trains else None
            hook.begin(micro_batch, beside, again=self._again)
        self.probe.begin(tu.get_non_tensor_data(micro_batch, "probe", default=None))
        return model_inputs, output_args

    def _set_masks(self, micro_batch: TensorDict, model_inputs: dict) -> None:
        self.context.clear()
        self.context.ablated = bool(tu.get_non_tensor_data(micro_batch, "ablate_quarantine", default=False))
        masks = masks_of(micro_batch)
        if masks is None:
            return
        to_tokens = partial(mask_beside, self, micro_batch, model_inputs)
        self.kind.set_masks(micro_batch, masks, to_tokens)

    # ---- activations ----

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict:
        model_output = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if self.probe.active:
            model_output.update(self._probed(micro_batch, output_args))
        training = torch.is_grad_enabled() and not self._asks_for_gradients(micro_batch)
        self._live_output = model_output if self.hooks and training else None
        return model_output

    @staticmethod
    def _asks_for_gradients(micro_batch: TensorDict) -> bool:
        """Per rollout, for a detector: the backward pass of an inference batch."""
        return gradient_probe(micro_batch) is not None or gradients_asked(micro_batch) is not None

    def _probed(self, micro_batch: TensorDict, output_args: dict) -> dict[str, torch.Tensor]:
        """What the probe heard, pooled over each rollout's tokens at the positions asked for."""
        lengths = micro_batch["input_ids"].offsets().diff().tolist()
        width = None  # packed
        if not tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True):
            width = max(lengths)

        def plan(position: str) -> PoolPlan:
            masks, segments = [], []
            for row, (length, mask) in enumerate(zip(lengths, micro_batch["response_mask"].unbind(), strict=True)):
                chosen = position_mask(mask, length - mask.shape[0], position)
                masks.append(torch.nn.functional.pad(chosen, (0, (width or length) - length)))
                segments.append(torch.full((width or length,), row, device=mask.device))
            return PoolPlan(torch.cat(masks), torch.cat(segments), len(lengths))

        def flatten(hidden: torch.Tensor) -> torch.Tensor:
            if width is None:
                return self._gather_and_unpad_packed(hidden.squeeze(0), output_args["pad_size"])
            return hidden.flatten(0, 1)

        def by_response(values_N: torch.Tensor) -> torch.Tensor:
            rows = values_N.split(lengths if width is None else [width] * len(lengths))
            responses = [mask.shape[0] for mask in micro_batch["response_mask"].unbind()]
            own = [row[length - R : length] for row, length, R in zip(rows, lengths, responses, strict=True)]
            return torch.nested.as_nested_tensor(own, layout=torch.jagged)

        plans = {position: plan(position) for position in self.probe.positions}
        return self.probe.finish(plans, flatten, by_response)

    # ---- the step ----

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        if not forward_only:
            loss_function = with_confessions(loss_function, data, self.get_data_parallel_group())
            self._mass = block_mass(data, self.get_data_parallel_group())
            self._gradients_anew = partial(self._recompute, data, loss_function)
        return self._pass(data, loss_function, forward_only)

    def _pass(self, data: TensorDict, loss_function: Callable, forward_only: bool) -> Any:
        try:
            return super().forward_backward_batch(data, loss_function, forward_only=forward_only)
        finally:
            self.context.clear()

    def _recompute(self, data: TensorDict, loss_function: Callable) -> None:
        self.optimizer_zero_grad()
        self._again = True
        try:
            with torch.enable_grad():
                self._pass(data, loss_function, forward_only=False)
        finally:
            self._again = False

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> tuple:
        for wanted, step in ((gradient_probe, fingerprint_step), (gradients_asked, bottleneck_step)):
            asked = wanted(micro_batch)
            if forward_only and asked is not None:
                return step(self, asked, super().forward_step, micro_batch)
        if not forward_only and tu.get_non_tensor_data(micro_batch, CURRENT, default=False):
            loss_function = with_current_log_probs(loss_function, routing_table(micro_batch))
        loss, output = super().forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)
        if not forward_only:
            for hook in self.hooks:
                extra = hook.extra_loss(self, self._live_output, micro_batch)
                if extra is not None:
                    loss = loss + extra
                    output["metrics"][f"routing/extra_loss/{hook.name}"] = extra.detach().item()
        return loss, output

    def optimizer_zero_grad(self) -> None:
        super().optimizer_zero_grad()
        self.module.zero_grad()  # what the optimizer holds may be views of the parameters

    def optimizer_step(self) -> float:
        assert self._gradients_anew is not None and self._mass is not None
        factors = self._mass.factors(self.blocks_config.optim.mean_over)
        try:
            return self.block_step(self._mass.tokens_2.tolist(), self._gradients_anew, factors)
        finally:
            self._gradients_anew = None  # it holds the mini-batch

    def train_batch(self, data: TensorDict, loss_function: Callable) -> Any:
        outputs = super().train_batch(data, loss_function)
        if self.is_mp_src_rank_with_outputs():
            # verl gathers a list from every rank and joins them
            outputs["metrics"].update({key: [value] for key, value in self.block_step.metrics.items()})
        return outputs

    # ---- weights out, weights in ----

    def get_per_tensor_param(self, layered_summon: bool = False, base_sync_done: bool = False, **kwargs: Any) -> tuple:
        options = {"layered_summon": layered_summon, "base_sync_done": base_sync_done, **kwargs}
        return self.kind.weights(self, super().get_per_tensor_param, **options)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        path = os.path.join(local_path, LAYOUT_FILE)
        if self.rank == 0 or not os.path.exists(path):  # every rank reads it on its own node's disk
            partial = f"{path}.{self.rank}"
            with open(partial, "w") as file:
                json.dump(self.kind.layout(self), file, indent=2)
            os.replace(partial, path)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        path = os.path.join(local_path, LAYOUT_FILE)
        if not os.path.exists(path):
            raise UserError("trainer.resume_from_path", local_path, f"no {LAYOUT_FILE} there: written without blocks")
        with open(path) as file:
            saved = json.load(file)
        own = self.kind.layout(self)
        for key in self.kind.layout_keys:
            if saved.get(key) != own[key]:
                fix = f"the checkpoint in {local_path} has {saved.get(key)!r}; set the same or start a new run"
                raise UserError(f"grad_routing.blocks.{key}", own[key], fix)
        self.kind.check_resumable(saved)
        super().load_checkpoint(local_path, *args, **kwargs)
