"""What scoring rollouts by their own gradients costs: detector ``persona_grad`` against one forward and backward pass.

Both run on the same engine, weights, rows and micro-batches. ``forward_backward`` is what an update does with the
rollouts before its optimizer step, PPO loss and gradients of both blocks included. ``scores`` is the pass that gives
every rollout the projection of its gradient on the direction: quarantine off, no parameter's gradient, bottlenecks on
every linear module of every layer.
"""

from __future__ import annotations

import torch

from verl_grad_routing.bench.step import MICRO, ROLLOUTS, Bench
from verl_grad_routing.bottleneck import Bottleneck
from verl_grad_routing.detectors.activation import LINEAR
from verl_grad_routing.routing import DEFAULT

RANK = 32


def forward_backward(bench: Bench) -> None:
    """Gradients of both blocks over all rollouts, left in place and cleared by the next call."""
    from verl.utils import tensordict_utils as tu

    data = bench.batch.copy()
    data["route"] = bench.routes
    tu.assign_non_tensor(data, routing_table=DEFAULT, micro_batch_size_per_gpu=MICRO, use_remove_padding=True)
    tu.assign_non_tensor(data, use_dynamic_bsz=False, use_fused_kernels=False, temperature=1.0, calculate_entropy=False)
    tu.assign_non_tensor(data, global_batch_size=ROLLOUTS, mini_batch_size=ROLLOUTS)
    with bench.engine.train_mode():
        bench.engine.optimizer_zero_grad()
        bench.engine.forward_backward_batch(data, bench.loss)


def scores(bench: Bench, basis: str = "svd") -> torch.Tensor:
    """Scores [B] of all rollouts by their own gradients."""
    from verl_grad_routing.training.bottleneck_step import READ, ReadGradients

    layers = tuple(range(1, len(bench.engine.probe.layers) + 1))
    bottleneck = Bottleneck(layers, LINEAR, RANK, basis)
    vectors_DMr = torch.nn.functional.normalize(torch.ones(1, len(layers) * len(LINEAR), RANK), dim=-1)
    asked = {READ: ReadGradients(bottleneck, vectors_DMr), "ablate_quarantine": True, "calculate_entropy": False}
    return torch.cat(list(bench.infer(bench.batch, **asked)[READ].unbind()))
