"""Columns of the TransferQueue as this package reads and writes them.

Shapes: N rows of the batch (pad rows included), B real rollouts, R response tokens.
"""

# The types that TransferQueue declares are narrower than what it passes.
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu


def dense(rows: torch.Tensor) -> torch.Tensor:
    """A column of equal rows as one tensor."""
    return rows.to_padded_tensor(0.0) if rows.is_nested else rows


def plain(column: Any) -> list:
    """A non-tensor column as a list, whichever container the TransferQueue's backend answers with."""
    return column.tolist() if hasattr(column, "tolist") else list(column)


CONFESSION = "confession"
"""Tag and column of a row that is a confession about another rollout; the column is ``PADDING`` in verl's padding."""

PADDING = -1


def live_rows(batch: KVBatchMeta) -> list[int]:
    """Row numbers without verl's padding, which has no response tokens."""
    return [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]


def real_rows(batch: KVBatchMeta) -> list[int]:
    """Row numbers of the rollouts that answer a prompt: neither padding nor confessions."""
    return [row for row in live_rows(batch) if not batch.tags[row].get(CONFESSION, False)]


def confession_rows(batch: KVBatchMeta) -> list[int]:
    """Row numbers of the confessions."""
    return [row for row in live_rows(batch) if batch.tags[row].get(CONFESSION, False)]


def part_of(batch: KVBatchMeta, rows: Sequence[int]) -> KVBatchMeta:
    """Those ``rows`` of ``batch``."""
    return KVBatchMeta(
        [batch.keys[row] for row in rows],
        [batch.tags[row] for row in rows],
        batch.partition_id,
        batch.fields,
        batch.extra_info,
    )


def read(batch: KVBatchMeta, *fields: str) -> TensorDict:
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))


def write(batch: KVBatchMeta, columns: dict[str, torch.Tensor | Sequence[torch.Tensor]]) -> KVBatchMeta:
    """Put columns, lists of rows as jagged ones. The answer has ``batch``'s tags and settings and all fields."""
    nested = {name: column if isinstance(column, torch.Tensor) else _jagged(column) for name, column in columns.items()}
    written = tq.kv_batch_put(
        keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(nested, batch_size=len(batch.keys))
    )
    return KVBatchMeta(batch.keys, batch.tags, batch.partition_id, written.fields, batch.extra_info)


def write_texts(batch: KVBatchMeta, columns: dict[str, Sequence[str]]) -> None:
    """Put columns of strings."""
    fields = tu.get_tensordict({name: list(column) for name, column in columns.items()})
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def _jagged(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
