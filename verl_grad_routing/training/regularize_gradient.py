"""Gradient regularisation: prefer weights where the loss is flat, by a second gradient a small step uphill."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.distributed.tensor import DTensor

from verl_grad_routing.directions.checks import require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.hooks import ENGINE_HOOKS, Blocks, EngineHook, local


@ENGINE_HOOKS.register("regularize_gradient")
class RegularizeGradient(EngineHook):
    """Gradient regularisation by finite difference (arXiv 2602.18037).

    With g1 = clip(∇L(φ)), φ' = φ + ε g1 and g2 = clip(∇L(φ')), the step's gradient is g1 + (γ / ε) (g2 - g1): to first
    order that of L + γ/2 |∇L|². Both gradients are of the same rollouts, advantages and old log-probs, over both blocks
    together; the weights are put back before the step. The paper's Eq. 5 has γ/2 where its pseudocode and code have γ;
    this is the latter.

    Costs one more forward and backward of the mini-batch and two copies of the blocks.
    """

    recomputes: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        gamma: float = 1e-3  # strength; 0 is vanilla. Paper: 1e-3 for mathematics, 1e-3 to 1e-1 swept in RLHF
        epsilon: float = 1e-3  # length of the finite step, in units of the clipped gradient (paper)
        clip: float = 10.0  # norm to which both gradients are clipped first (paper)

        def __post_init__(self) -> None:
            require_number("gamma", self.gamma, 0)
            require_number("epsilon", self.epsilon, 0)
            require_number("clip", self.clip, 0)
            for key in ("epsilon", "clip"):
                if getattr(self, key) == 0:
                    raise UserError(key, 0, "give a positive number; gamma: 0 switches the method off")

    config: Config

    def transform_gradients(self, blocks: Blocks, recompute: Callable[[], None]) -> None:
        self.metrics = {}
        parameters = [p for block in blocks.values() for p in block if p.grad is not None]
        if self.config.gamma == 0 or not parameters:
            return
        self._refuse_rounding(parameters)
        norm = self._clip(parameters)
        if not math.isfinite(norm):
            return  # the step is skipped
        first = [local(p.grad).clone() for p in parameters]  # type: ignore[arg-type]
        start = [local(p.detach()).clone() for p in parameters]
        for parameter, gradient in zip(parameters, first, strict=True):
            local(parameter.detach()).add_(gradient, alpha=self.config.epsilon)
        recompute()
        moved_norm = self._clip(parameters)
        for parameter, old, gradient in zip(parameters, start, first, strict=True):
            local(parameter.detach()).copy_(old)
            second = local(parameter.grad)  # type: ignore[arg-type]
            second.sub_(gradient).mul_(self.config.gamma / self.config.epsilon).add_(gradient)
        self.metrics = {"grad_norm": norm, "grad_norm_uphill": moved_norm}

    def _clip(self, parameters: list[torch.nn.Parameter]) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @staticmethod
    def _refuse_rounding(parameters: list[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.dtype != torch.float32:
                fix = "a finite step needs float32 weights; set actor_rollout_ref.actor.fsdp_config.model_dtype=fp32"
                raise UserError("grad_routing.blocks.hooks regularize_gradient", parameter.dtype, fix)
