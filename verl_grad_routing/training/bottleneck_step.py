"""Bottleneck gradients of a micro-batch: verl's own forward, a backward pass that no parameter sees, nothing else.

A batch asks by the non-tensor ``bottleneck_gradients`` and may ask for the quarantine-ablated model
(``ablate_quarantine``) or the bare base model (``no_lora_adapter``), as any inference batch.

Shapes: B rollouts, M modules, r rank, D directions.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_from_nested

from verl_grad_routing.bottleneck import Bottleneck, KeptCoordinates, ProjectedCoordinates
from verl_grad_routing.fingerprints import GradientTaps, probed_modules
from verl_grad_routing.training.fingerprint_step import checkpointing, token_spans

READ = "bottleneck_gradients"


@dataclass(frozen=True, eq=False)
class ReadGradients:
    """Return ``bottleneck_gradients``: coordinates [B, M * r], or scores [B, D] where there are directions."""

    bottleneck: Bottleneck
    vectors_DMr: Tensor | None = None
    cosine: bool = False


def gradients_asked(data: TensorDict) -> ReadGradients | None:
    """What the rows of ``data`` ask for, if they ask for gradients of bottlenecks."""
    return tu.get_non_tensor_data(data, READ, default=None)


def mean_response_nll(*, model_output: dict[str, Any], data: TensorDict, **_: Any) -> tuple[Tensor, dict]:
    """Sum over rollouts of the mean negative log-likelihood of their response tokens, in float32."""
    mask = data["response_mask"]
    log_probs = response_from_nested(model_output["log_probs"], mask)
    counts_B = torch.stack([row.sum() for row in mask.unbind()]).clamp(min=1)
    weights = mask.values().float() / counts_B.repeat_interleave(mask.offsets().diff())
    return -(log_probs.values().float() * weights).sum(), {}


def bottleneck_step(engine: Any, asked: ReadGradients, forward_step: Callable, micro_batch: TensorDict) -> tuple:
    """What ``asked`` wants to know of ``micro_batch``, as verl's forward step would return it.

    Args:
        engine: The engine, for its decoder layers, its bases and its layout of tokens.
        forward_step: verl's own, of that engine.
    """
    layers, spans = engine.probe.layers, token_spans(engine, micro_batch)
    bases = engine.probe.bases.of(asked.bottleneck)
    if asked.vectors_DMr is None:
        consumer: KeptCoordinates | ProjectedCoordinates = KeptCoordinates(bases, spans)
    else:
        consumer = ProjectedCoordinates(bases, spans, asked.vectors_DMr, asked.cosine)
    modules = probed_modules(layers, asked.bottleneck)
    with torch.enable_grad(), checkpointing(layers), GradientTaps(modules, consumer) as taps:
        loss, output = forward_step(micro_batch, loss_function=mean_response_nll, forward_only=True)
        taps.backward(loss)
    output["model_output"] = {READ: consumer.rows}
    return loss.detach(), output
