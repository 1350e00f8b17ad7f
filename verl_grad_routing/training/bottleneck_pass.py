"""The driver's side of bottleneck gradients: pairs or rollouts to the workers, one row of numbers back for each.

Shapes: P pairs, B rollouts, M modules, r rank, D directions.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false
from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from verl_grad_routing.directions import PairSet
from verl_grad_routing.training.bottleneck_step import READ, ReadGradients
from verl_grad_routing.training.columns import dense
from verl_grad_routing.training.fingerprint_pass import engine_rows
from verl_grad_routing.training.pairs_pass import pair_rows


def pair_gradients(
    worker_group: Any,
    pairs: PairSet,
    tokenizer: Any,
    asked: ReadGradients,
    score_pass: str,
    rows: int,
    batching: dict[str, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates of the pairs' unwanted and wanted sides, ``[P, M, r]`` each, under the scoring pass's model.

    Args:
        score_pass: ``reference`` (adapters off) or ``ablated`` (quarantine off).
        rows: At least 2 P, and what ranks and micro-batches divide.
        batching: The micro-batch setting that goes with ``rows``.
    """
    found = _taken(worker_group, pair_rows(pairs, tokenizer, rows), asked, score_pass, batching)
    found_PMr = found[: 2 * len(pairs)].reshape(2 * len(pairs), -1, asked.bottleneck.rank)
    return found_PMr[: len(pairs)], found_PMr[len(pairs) :]


def rollout_rows(
    worker_group: Any, batch: KVBatchMeta, asked: ReadGradients, score_pass: str, rows: int, batching: dict[str, int]
) -> torch.Tensor:
    """Scores [B, D] of the rollouts of ``batch``, or coordinates [B, M * r] without directions; arguments as above."""
    return _taken(worker_group, engine_rows(batch, rows), asked, score_pass, batching)[: len(batch.keys)]


def _taken(
    worker_group: Any, data: TensorDict, asked: ReadGradients, score_pass: str, batching: dict[str, int]
) -> torch.Tensor:
    settings = {"compute_loss": False, "calculate_entropy": False, "temperature": 1.0, READ: asked}
    model = {"no_lora_adapter": score_pass == "reference", "ablate_quarantine": score_pass == "ablated"}
    tu.assign_non_tensor(data, **settings, **model, **batching)
    return dense(worker_group.bottleneck_gradients(data)[READ])
