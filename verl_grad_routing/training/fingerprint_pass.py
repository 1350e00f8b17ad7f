"""The driver's side of gradient fingerprints: rows of the batch to the workers, one row of numbers back for each.

Shapes: B rollouts asked about, F length of a fingerprint, L layers.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import GradientProbe
from verl_grad_routing.training.columns import dense, plain, read
from verl_grad_routing.training.fingerprint_step import ASKED
from verl_grad_routing.training.probe import AdjacentCosines

FIELDS = ("input_ids", "position_ids", "prompts", "responses", "response_mask", "loss_mask")


def engine_rows(batch: KVBatchMeta, count: int) -> TensorDict:
    """``count`` rows for verl's engine: those of ``batch``, then repeats of them.

    Raises:
        UserError: The rollouts have images or the like, which these rows would lose.
    """
    inputs = "multi_modal_inputs"  # verl writes the column for text too, with nothing in it
    if inputs in (batch.fields or ()) and any(plain(read(batch, inputs)[inputs])):
        raise UserError("grad_routing.detector.name", "fingerprints", "only text rollouts can be fingerprinted")
    data = read(batch, *FIELDS)
    columns = {}
    for field in FIELDS:
        rows = list(data[field].unbind())
        rows = [rows[index % len(rows)] for index in range(count)]
        columns[field] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return TensorDict(columns, batch_size=[count])


def adjacent_cosines(worker_group: Any, batch: KVBatchMeta, layers: int, rows: int, batching: dict) -> torch.Tensor:
    """How far each of ``layers`` decoder layers turns each rollout's response tokens: mean cosine, [B, L]."""
    request = {"probe": AdjacentCosines(tuple(range(1, layers + 1)))}
    output = _asked(worker_group.pool_activations, batch, rows, request, batching)
    return dense(output["activation_pooled"])[: len(batch.keys)]


def fingerprints(
    worker_group: Any, batch: KVBatchMeta, probe: GradientProbe, rows: int, batching: dict
) -> torch.Tensor:
    """Fingerprints of the rollouts of ``batch``, [B, F] float32.

    Args:
        rows: At least B, and what ranks and micro-batches divide.
        batching: The micro-batch setting that goes with ``rows``.
    """
    output = _asked(worker_group.fingerprint, batch, rows, {ASKED: probe}, batching)
    return dense(output["fingerprints"])[: len(batch.keys)]


def _asked(call: Callable, batch: KVBatchMeta, rows: int, request: dict, batching: dict) -> TensorDict:
    data = engine_rows(batch, rows)
    settings = {"compute_loss": False, "calculate_entropy": False, "temperature": 1.0}
    tu.assign_non_tensor(data, **settings, **request, **batching)
    return call(data)
