"""Two blocks inside a model: PEFT adapters ``default`` and ``quarantine`` run by our kernel.

PEFT keeps what it does well (parameters, names, files, merging, ``disable_adapter``); only the forward of its linear
LoRA layer is ours. What our forward cannot do is refused in one line, never left to PEFT's own forward, which would
compute the same outputs with gradients that are not routed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.blocks import (
    BLOCKS,
    DEPLOYED_ADAPTER,
    QUARANTINE_ADAPTER,
    check_ranks,
    joined_lora_config,
)
from verl_grad_routing.routing.contrast import Contrast
from verl_grad_routing.routing.forms import FORMS, Form, get_form
from verl_grad_routing.routing.initialise import check_contrast, initialise_blocks, parts_of, placed_like
from verl_grad_routing.routing.kernel import over_ranks, routed_linear


class RoutingContext:
    """The masks of the tokens in flight, shared by all adapted layers of one model.

    Set it before a forward pass. The masks stay until the next :meth:`set` or :meth:`clear`, beyond the end of the
    forward pass on purpose: activation checkpointing runs the forward again inside ``backward()`` and must see the
    same masks. So call :meth:`set` or :meth:`clear` only once the backward pass of the previous tokens is done.

    Attributes:
        forward_gate: ``[..., T, 2]``, broadcastable over the leading dimensions of every adapted layer's input;
            ``None`` is 1 everywhere. Read only, as the next; :meth:`set` both.
        update_mask: Likewise.
        ablated: The quarantine is absent, as at deployment. Masks are not consulted then.
    """

    def __init__(self) -> None:
        self._forward_gate: Tensor | None = None
        self._update_mask: Tensor | None = None
        self.ablated: bool = False
        self._of_ranks: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = {}

    def set(self, forward_gate: Tensor | None, update_mask: Tensor | None) -> None:
        """Masks of the next forward pass and of the backward pass that belongs to it."""
        self._forward_gate, self._update_mask = forward_gate, update_mask
        self._of_ranks.clear()

    @property
    def forward_gate(self) -> Tensor | None:
        return self._forward_gate

    @property
    def update_mask(self) -> Tensor | None:
        return self._update_mask

    def of_ranks(self, deployed_rank: int, quarantine_rank: int) -> tuple[Tensor | None, Tensor | None]:
        """Both masks repeated over the ranks of the blocks, ``[..., T, R]``, made once for all layers."""
        ranks = (deployed_rank, quarantine_rank)
        if ranks not in self._of_ranks:
            with torch.inference_mode(False):  # a pass with gradients may follow under the same masks
                gate, update = (
                    None if mask is None else over_ranks(mask, *ranks, name)
                    for name, mask in (("forward_gate", self.forward_gate), ("update_mask", self.update_mask))
                )
            self._of_ranks[ranks] = gate, update
        return self._of_ranks[ranks]

    def clear(self) -> None:
        """Back to the plain model: both blocks act and learn everywhere, nothing ablated."""
        self.set(None, None)
        self.ablated = False


class Part(nn.Module):
    """One part of one block in one layer, as a parameter that FSDP shards with the rest of the layer."""

    def __init__(self, value: Tensor, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(value, requires_grad=trained)


class RoutedLoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer over a frozen ``nn.Linear``, its forward and backward by :func:`routed_linear`.

    The base layer's weight is used directly, so forward hooks on ``base_layer`` or on the adapters' own submodules
    are not called (hooks on this layer are).

    Attributes:
        form: What the blocks keep of this layer; plain LoRA until :meth:`set_form`.
    """

    routing_context: RoutingContext | None = None
    form: Form = FORMS["lora"]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if type(base_layer) is not nn.Linear:
            where = f"target_modules ({kwargs.get('target_name', 'module')})"
            raise UserError(where, type(base_layer).__name__, "only torch.nn.Linear can be routed; exclude it")
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """PEFT's, for the two blocks and plain LoRA only."""
        if adapter_name not in BLOCKS.values():
            raise UserError("adapter", adapter_name, f"a routed model has the adapters {list(BLOCKS.values())} only")
        if config.lora_dropout:
            raise UserError("lora_dropout", config.lora_dropout, "set it to 0; routed blocks have no dropout")
        for option in ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"):
            if getattr(config, option):
                raise UserError(option, True, "set it to false; routed blocks are plain LoRA")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if self.lora_variant:
            raise UserError("LoRA variant", sorted(self.lora_variant), "routed blocks are plain LoRA")
        base = cast(nn.Linear, self.get_base_layer())
        if base.weight.is_meta:  # PEFT moves only a layer's first adapter to the meta device
            for side in (self.lora_A, self.lora_B):
                side[adapter_name].to("meta", dtype=base.weight.dtype)

    def set_form(self, form: Form) -> None:
        """Add the form's own parts to both blocks, zero, and freeze those that do not train."""
        self.form = form
        for part in form.extra_parts:
            self.add_module(f"lora_{part}", nn.ModuleDict())
        for block, adapter in BLOCKS.items():
            A, B = (cast(nn.Linear, side[adapter]).weight for side in (self.lora_A, self.lora_B))
            for part, shape in form.extra_shapes(block, len(A), A.shape[1], len(B)).items():
                zeros = torch.zeros(shape, dtype=A.dtype, device=A.device)
                getattr(self, f"lora_{part}")[adapter] = Part(zeros, part in form.trained)
        self._freeze_parts()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's, which lets A and B train, also on leaving ``disable_adapter``; what the form freezes stays frozen."""
        super().set_adapter(adapter_names, inference_mode)
        self._freeze_parts()

    def _freeze_parts(self) -> None:
        for adapter in BLOCKS.values():
            for part, value in parts_of(self, adapter).items():
                if part not in self.form.trained:
                    value.requires_grad_(False)

    def reads(self, adapter: str) -> Tensor:
        """Rows ``[r, d_in]``: what a block reads of this layer's input."""
        return self.form.reads(parts_of(self, adapter))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """PEFT's, for merging: ``scaling · B A [d_out, d_in]``, of whatever form."""
        if not self.form.extra_parts:
            return super().get_delta_weight(adapter)
        whole = {part: getattr(t, "full_tensor", lambda t=t: t)() for part, t in parts_of(self, adapter).items()}
        A, B = self.form.adapter(whole)
        return placed_like(cast(nn.Linear, self.get_base_layer()).weight, self.scaling[adapter] * (B @ A))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus the active blocks, ``x [..., T, d_in] -> [..., T, d_out]``."""
        if args or kwargs:
            raise UserError("forward arguments", sorted(kwargs) or len(args), "routed layers take the input only")
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        context = self.routing_context
        if context is None:
            raise UserError("routing_context", None, "build the model with add_blocks")
        if self.merged:
            return self._merged_forward(x, context)
        return self._routed_forward(x, context)

    def _routed_forward(self, x: Tensor, context: RoutingContext) -> Tensor:
        active = [name for name in self.active_adapters if not (context.ablated and name == QUARANTINE_ADAPTER)]
        if not active:
            raise UserError("active adapters", list(self.active_adapters), "leave the default adapter active")
        gate, update = (None, None) if context.ablated else (context.forward_gate, context.update_mask)
        base = cast(nn.Linear, self.get_base_layer())
        if len(active) == 1:
            A, B = self._weights(active[0])
            return routed_linear(x, base.weight, base.bias, A, None, B, None, gate, update, self.scaling[active[0]])
        scaling = self.scaling[DEPLOYED_ADAPTER]
        if scaling != self.scaling[QUARANTINE_ADAPTER]:
            raise UserError("scaling", dict(self.scaling), "both blocks need the same scaling")
        (A_d, B_d), (A_q, B_q) = self._weights(DEPLOYED_ADAPTER), self._weights(QUARANTINE_ADAPTER)
        of_ranks = context.of_ranks(len(A_d), len(A_q))  # an ablated model has one active adapter
        return routed_linear(x, base.weight, base.bias, A_d, A_q, B_d, B_q, gate, update, scaling, of_ranks)

    def _weights(self, adapter: str) -> tuple[Tensor, Tensor]:
        if self.form.extra_parts:
            return self.form.adapter(parts_of(self, adapter))
        return cast(nn.Linear, self.lora_A[adapter]).weight, cast(nn.Linear, self.lora_B[adapter]).weight

    def _merged_forward(self, x: Tensor, context: RoutingContext) -> Tensor:
        wanted = {name for name in self.active_adapters if not (context.ablated and name == QUARANTINE_ADAPTER)}
        if set(self.merged_adapters) != wanted:
            raise UserError("merged adapters", self.merged_adapters, f"unmerge first: {sorted(wanted)} should act")
        if not context.ablated and (context.forward_gate is not None or context.update_mask is not None):
            raise UserError(
                "merged adapters", self.merged_adapters, "masks cannot act on merged weights; unmerge first"
            )
        return self.base_layer(x)


def add_blocks(
    model: nn.Module,
    *,
    deployed_rank: int,
    quarantine_rank: int,
    scaling: float,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    init: str | None = "random_orthogonal",
    form: str = "lora",
    seed: int = 0,
    contrast: Contrast | None = None,
    task_type: str | None = None,
    autocast_adapter_dtype: bool = True,
) -> tuple[PeftModel, RoutingContext]:
    """Freeze ``model`` and add both blocks to its linear layers, both active and trainable.

    Args:
        scaling: LoRA's alpha / rank, the same for both blocks.
        target_modules: ``"all-linear"``, a regular expression, or name suffixes, as PEFT has them.
        exclude_modules: Likewise, taken out again.
        init: A name in ``INITIALISATIONS``; parameters on the meta device wait for :func:`initialise_blocks`. ``None``
            for values that are loaded next.
        form: A name in ``FORMS``: what the blocks keep of every layer.
        contrast: Of the inputs of the layers, for an ``init`` that reads pairs (``corda``, ``scorda``, ``scorda_rev``).
        task_type: PEFT's; default ``CAUSAL_LM`` for models that generate, none for others.
        autocast_adapter_dtype: PEFT's: keep adapters of a half-precision model in float32.

    Returns:
        The PEFT model and the context that its routed layers share.

    Raises:
        UserError: A rank below 1, a bad scaling, an unknown ``init`` or ``form``, or a target that is not
            ``nn.Linear`` (named).
    """
    check_ranks(deployed_rank, quarantine_rank)
    kept = get_form(form)
    if init is not None:
        check_contrast(init, contrast is not None)
    if not (math.isfinite(scaling) and scaling > 0):
        raise UserError("scaling", scaling, "give alpha / rank, a positive number")
    if task_type is None and hasattr(model, "prepare_inputs_for_generation"):
        task_type = "CAUSAL_LM"

    def config(rank: int, targets: Any) -> LoraConfig:
        values = joined_lora_config(rank, 0, scaling)
        exclude = exclude_modules if exclude_modules is None or isinstance(exclude_modules, str) else [*exclude_modules]
        lora = LoraConfig(**values, target_modules=targets, exclude_modules=exclude, bias="none", task_type=task_type)
        # PEFT's own way to bring a layer class: it dispatches on the type of the base layer when a layer is created.
        lora._register_custom_module({nn.Linear: RoutedLoraLinear})
        return lora

    deployed = config(deployed_rank, target_modules if isinstance(target_modules, str) else [*target_modules])
    _refuse_other_targets(model, deployed)
    peft_model = get_peft_model(model, deployed, DEPLOYED_ADAPTER, autocast_adapter_dtype=autocast_adapter_dtype)
    # "all-linear" has been resolved to names by now; resolving it again would find the adapters' own layers.
    resolved = deployed.target_modules
    quarantine = config(quarantine_rank, resolved if isinstance(resolved, str) else sorted(resolved or ()))
    peft_model.add_adapter(QUARANTINE_ADAPTER, quarantine, autocast_adapter_dtype=autocast_adapter_dtype)
    cast(LoraModel, peft_model.base_model).set_adapter([*BLOCKS.values()])
    context = _share_context(peft_model, scaling, kept)
    if init is not None:
        initialise_blocks(peft_model, init, seed, contrast)
    return peft_model, context


def routing_context(model: nn.Module) -> RoutingContext:
    """The context that ``model``'s routed layers share. Raises ``UserError`` when it has none."""
    for module in model.modules():
        if isinstance(module, RoutedLoraLinear) and module.routing_context is not None:
            return module.routing_context
    raise UserError("model", type(model).__name__, "has no routed layers; build it with add_blocks")


def _refuse_other_targets(model: nn.Module, config: LoraConfig) -> None:
    """Refuse targets that are not ``nn.Linear`` before PEFT touches the model."""
    if config.target_modules == "all-linear":
        return
    for name, module in model.named_modules():
        if name and check_target_module_exists(config, name) and type(module) is not nn.Linear:
            fix = f"only torch.nn.Linear can be routed; exclude {name!r}"
            raise UserError(f"target_modules ({name})", type(module).__name__, fix)


def _share_context(model: PeftModel, scaling: float, form: Form) -> RoutingContext:
    context = RoutingContext()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if not isinstance(module, RoutedLoraLinear):
                fix = f"only torch.nn.Linear can be routed; exclude {name!r}"
                raise UserError(f"target_modules ({name})", type(module.get_base_layer()).__name__, fix)
            module.routing_context = context
            module.scaling.update(dict.fromkeys(BLOCKS.values(), scaling))  # alpha / rank, without its rounding
            if form.extra_parts:
                module.set_form(form)
    return context
