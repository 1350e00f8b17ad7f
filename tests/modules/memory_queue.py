"""A TransferQueue in memory: the calls that a step makes, for the trainer without Ray."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict

from verl_grad_routing.training.columns import plain


class Queue:
    """``transfer_queue``'s answers: ragged columns as jagged tensors.

    Attributes:
        rows: key -> column -> value.
        calls: What replaces functions of the module ``transfer_queue``, by name.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.calls = {"kv_batch_get": self.get, "kv_batch_put": self.put, "kv_clear": self.clear}

    def get(self, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> TensorDict:
        names = set.intersection(*(set(self.rows[key]) for key in keys))
        chosen = sorted(names if select_fields is None else names & set(select_fields))
        return TensorDict({n: self._column([self.rows[k][n] for k in keys]) for n in chosen}, batch_size=len(keys))

    @staticmethod
    def _column(values: list[Any]) -> Any:
        if not all(isinstance(value, torch.Tensor) for value in values):
            return NonTensorStack(*values)
        if all(value.dim() == 0 for value in values):
            return torch.stack(values)
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    def put(self, keys: list[str], partition_id: str, fields: Any, tags: Any = None) -> Any:
        from transfer_queue import KVBatchMeta

        for name in list(fields.keys()):
            column = fields[name]
            values = list(column.unbind()) if isinstance(column, torch.Tensor) else plain(column)
            for key, value in zip(keys, values, strict=True):
                self.rows.setdefault(key, {})[name] = value
        names = sorted(set.intersection(*(set(self.rows[key]) for key in keys)))
        return KVBatchMeta(partition_id=partition_id, keys=list(keys), tags=tags or [{}] * len(keys), fields=names)

    def clear(self, keys: list[str], partition_id: str) -> None:
        for key in keys:
            del self.rows[key]
