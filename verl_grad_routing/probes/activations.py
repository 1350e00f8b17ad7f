"""Pooled activations of given rollouts under a Hugging Face model, as verl's engine pools them in a run.

Shapes: N rollouts, L layers, d hidden size, B rollouts of a batch, S padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from verl_grad_routing.directions import PoolPlan, position_mask
from verl_grad_routing.probes.rollouts import Rollout
from verl_grad_routing.training.probe import ActivationProbe, Pool

BATCH = 32


def pooled_activations(
    model: Any, rollouts: Sequence[Rollout], layers: tuple[int, ...], position: str, batch: int = BATCH
) -> Tensor:
    """``[N, L, d]``, float32 on the CPU; a rollout's row does not depend on the others but for rounding.

    Raises ``UserError`` for a layer that the model does not have.
    """
    probe = ActivationProbe(model)
    order = sorted(range(len(rollouts)), key=lambda row: len(rollouts[row].prompt) + len(rollouts[row].response))
    found: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        probe.begin(Pool(layers, position))
        tokens_BS, attention_BS, counted_BS = (t.to(device) for t in _padded([rollouts[r] for r in rows], position))
        with torch.inference_mode():
            model(input_ids=tokens_BS, attention_mask=attention_BS, use_cache=False)
        segment = torch.arange(len(rows), device=device).repeat_interleave(tokens_BS.shape[1])
        plan = PoolPlan(counted_BS.flatten(), segment, len(rows))
        pooled = probe.finish({probe.positions[0]: plan}, lambda hidden: hidden.flatten(0, -2))["activation_pooled"]
        found |= dict(zip(rows, pooled.float().cpu().reshape(len(rows), len(layers), -1), strict=True))
    probe.begin(None)
    return torch.stack([found[row] for row in range(len(rollouts))])


def _padded(rollouts: Sequence[Rollout], position: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention and the tokens that are pooled, [B, S] each, padded on the right."""
    width = max(len(row.prompt) + len(row.response) for row in rollouts)
    shape = (len(rollouts), width)
    tokens_BS, attention_BS = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    counted_BS = torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rollouts):
        length = len(row.prompt) + len(row.response)
        tokens_BS[index, :length] = torch.tensor([*row.prompt, *row.response])
        attention_BS[index, :length] = 1
        counted_BS[index, :length] = position_mask(torch.tensor(row.mask), len(row.prompt), position)
    return tokens_BS, attention_BS, counted_BS
