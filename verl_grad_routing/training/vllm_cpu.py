"""Runs in every vLLM process (entry-point group ``vllm.general_plugins``).

vLLM's CPU build packs linear weights when a model is loaded and drops the originals, so a later weight update finds
nothing to write to. Here the weights stay: the CPU dispatch becomes plain ``F.linear``. GPU builds are left alone.
"""

from __future__ import annotations


def _keep_linear_weights(layer, remove_weight: bool) -> None:
    """In place of vLLM's ``dispatch_cpu_unquantized_gemm``: no packing, no removal."""
    import torch

    layer.cpu_linear = torch.nn.functional.linear


def register() -> None:
    from verl_grad_routing.training import vllm_metadata

    vllm_metadata.install()
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    # vLLM's dispatch function is not behind a registry; its callers import it by name at call time from these modules.
    from vllm.model_executor.layers import linear, utils

    for module in (utils, linear):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            setattr(module, "dispatch_cpu_unquantized_gemm", _keep_linear_weights)  # noqa: B010
