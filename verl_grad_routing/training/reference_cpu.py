"""verl's stock engines on machines without an accelerator."""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import torch
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")(FSDPEngineWithValueHead)


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
class CpuEngine(FSDPEngineWithLMHead):
    """verl's language-model engine, for presets without blocks and for the reference model of full-parameter runs.

    verl keeps a reference model in pinned memory, off its accelerator; without one nothing can be pinned, and the
    model already is where it would be offloaded to.
    """

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        reference = self.engine_config.forward_only
        object.__setattr__(self.engine_config, "forward_only", False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            object.__setattr__(self.engine_config, "forward_only", reference)
