"""Routing itself, in pure torch and PEFT: routes and masks, the kernel, the two blocks and their start.

The names are loaded on first use, so that ``from verl_grad_routing.routing import Route`` does not import PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_grad_routing.routing.blocks import (
        BLOCKS,
        DEPLOYED_ADAPTER,
        QUARANTINE_ADAPTER,
        block_of,
        block_parameters,
        check_ranks,
        check_total_rank,
        deployed_only,
        is_zero,
        join_blocks,
        joined_lora_config,
        plain_adapters,
        quarantine_only,
        split_blocks,
        vllm_ranks,
    )
    from verl_grad_routing.routing.contrast import Contrast, load_contrast, save_contrast
    from verl_grad_routing.routing.forms import FORMS, Form, get_form, register_form
    from verl_grad_routing.routing.initialise import (
        INITIALISATIONS,
        check_contrast,
        initialisation_report,
        initialise_blocks,
        register_initialisation,
    )
    from verl_grad_routing.routing.install import RoutedLoraLinear, RoutingContext, add_blocks, routing_context
    from verl_grad_routing.routing.kernel import over_ranks, routed_linear, routed_lora
    from verl_grad_routing.routing.routes import (
        ACTIVATION_MASKING,
        DEFAULT,
        STRICT,
        Route,
        RouteMasks,
        RoutingTable,
        activation_gradients,
        block_masks,
        expand_to_padded,
        expand_to_tokens,
        slice_for_sequence_parallel,
    )

_MODULES = {
    "blocks": "BLOCKS DEPLOYED_ADAPTER QUARANTINE_ADAPTER block_of block_parameters check_ranks check_total_rank "
    "deployed_only is_zero join_blocks joined_lora_config plain_adapters quarantine_only split_blocks vllm_ranks",
    "contrast": "Contrast load_contrast save_contrast",
    "forms": "FORMS Form get_form register_form",
    "initialise": "INITIALISATIONS check_contrast initialisation_report initialise_blocks register_initialisation",
    "install": "RoutedLoraLinear RoutingContext add_blocks routing_context",
    "kernel": "over_ranks routed_linear routed_lora",
    "routes": "ACTIVATION_MASKING DEFAULT STRICT Route RouteMasks RoutingTable activation_gradients block_masks "
    "expand_to_padded expand_to_tokens slice_for_sequence_parallel",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [  # noqa: RUF022 (by module)
    "BLOCKS",
    "DEPLOYED_ADAPTER",
    "QUARANTINE_ADAPTER",
    "block_of",
    "block_parameters",
    "check_ranks",
    "check_total_rank",
    "deployed_only",
    "is_zero",
    "join_blocks",
    "joined_lora_config",
    "plain_adapters",
    "quarantine_only",
    "split_blocks",
    "vllm_ranks",
    "Contrast",
    "load_contrast",
    "save_contrast",
    "FORMS",
    "Form",
    "get_form",
    "register_form",
    "INITIALISATIONS",
    "check_contrast",
    "initialisation_report",
    "initialise_blocks",
    "register_initialisation",
    "RoutedLoraLinear",
    "RoutingContext",
    "add_blocks",
    "routing_context",
    "over_ranks",
    "routed_linear",
    "routed_lora",
    "ACTIVATION_MASKING",
    "DEFAULT",
    "STRICT",
    "Route",
    "RouteMasks",
    "RoutingTable",
    "activation_gradients",
    "block_masks",
    "expand_to_padded",
    "expand_to_tokens",
    "slice_for_sequence_parallel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
