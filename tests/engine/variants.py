"""One mini-batch, many ways to compute its gradients: all of them must agree with the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.engine.rollouts import PLAIN, RICH, Loss, Rollout, routed
from verl_grad_routing.interventions import INTERVENTIONS
from verl_grad_routing.routing import ACTIVATION_MASKING, DEFAULT, STRICT, RoutingTable


def head_start(unflagged: str) -> RoutingTable:
    """The table of ``route`` in the first of two steps of a head start."""
    settings = {"name": "route", "head_start_steps": 2, "head_start_unflagged": unflagged}
    return INTERVENTIONS.build(settings, "test").table_at(1)


TABLES = {
    "DEFAULT": DEFAULT,
    "STRICT": STRICT,
    "ACTIVATION_MASKING": ACTIVATION_MASKING,
    "HEAD_START_NOTHING": head_start("nothing"),
    "HEAD_START_QUARANTINE": head_start("quarantine"),
}


@dataclass(frozen=True)
class Variant:
    """How a mini-batch is fed.

    Attributes:
        engine: Options of ``World.engine``.
        batch: Options of ``batch``, ``table`` by its name.
        order: ``as_is``, ``reversed``, ``shuffled`` or ``by_route`` (with two ranks, each holds other routes).
    """

    engine: Mapping[str, Any] = field(default_factory=dict)
    batch: Mapping[str, Any] = field(default_factory=dict)
    order: str = "as_is"
    loss: Loss = PLAIN
    routes: tuple[int, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    tolerance: float = 1e-5

    @property
    def table(self) -> str:
        return self.batch.get("table", "DEFAULT")

    def rows(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        rows = routed(list(rollouts), *self.routes) if self.routes else list(rollouts)
        if self.order == "reversed":
            return rows[::-1]
        if self.order == "shuffled":
            return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
        if self.order == "by_route":
            rows = sorted(rows, key=lambda row: row.route)
            half = len(rows) // 2
            return [row for pair in zip(rows[:half], rows[half:], strict=True) for row in pair]
        return rows


ONE = (1,)  # nothing about these depends on the number of ranks

VARIANTS = {
    "packed": Variant(),
    "packed rows of one": Variant(batch={"micro": 1}, sizes=ONE),
    "packed rows of two": Variant(batch={"micro": 2}),
    "padded": Variant(batch={"packed": False}),
    "padded rows of one": Variant(batch={"packed": False, "micro": 1}),
    "padded rows of three": Variant(batch={"packed": False, "micro": 3}, sizes=ONE),
    "dynamic": Variant(batch={"max_tokens": 30}),
    "dynamic padded": Variant(batch={"max_tokens": 30, "packed": False}),
    "reversed": Variant(batch={"micro": 3}, order="reversed", sizes=ONE),
    "shuffled": Variant(batch={"micro": 3}, order="shuffled"),
    "ranks of other routes": Variant(batch={"micro": 3}, order="by_route"),
    "rich loss": Variant(batch={"micro": 3}, loss=RICH),
    "rich loss padded": Variant(batch={"micro": 3, "packed": False}, loss=RICH, sizes=ONE),
    "rich loss dynamic": Variant(batch={"max_tokens": 40}, loss=RICH),
    "weights": Variant(batch={"micro": 3, "weighted": True}),
    "weights padded": Variant(batch={"micro": 2, "packed": False, "weighted": True}, sizes=ONE),
    "strict table": Variant(batch={"micro": 3, "table": "STRICT"}),
    "activation masking": Variant(batch={"micro": 3, "table": "ACTIVATION_MASKING"}),
    "head start": Variant(batch={"micro": 3, "table": "HEAD_START_NOTHING"}),
    "head start, quarantine": Variant(batch={"micro": 3, "table": "HEAD_START_QUARANTINE"}),
    "checkpointed": Variant({"checkpointing": True}, batch={"micro": 3}),
    "strict table checkpointed": Variant({"checkpointing": True}, batch={"micro": 3, "table": "STRICT"}),
    "head start checkpointed": Variant({"checkpointing": True}, batch={"micro": 3, "table": "HEAD_START_NOTHING"}),
    "checkpointed padded": Variant({"checkpointing": True}, batch={"micro": 2, "packed": False}, loss=RICH, sizes=ONE),
    "packed to buckets": Variant({"fsdp": {"pad_to_length": True, "pad_to_length_bucket": 32}}, batch={"micro": 3}),
    "unequal ranks": Variant({"ranks": "unequal"}, batch={"micro": 3}),
    "unequal ranks padded": Variant({"ranks": "unequal"}, batch={"micro": 2, "packed": False}, order="by_route"),
    "reduced every time": Variant({"fsdp": {"use_no_sync_for_gradient_accumulation": False}}, batch={"micro": 2}),
    "kept after forward": Variant({"fsdp": {"reshard_after_forward": False}}, batch={"micro": 2}),
    "replicated": Variant({"fsdp": {"fsdp_size": 1}}, batch={"micro": 2}, sizes=(2,)),
    "all absorbed": Variant(batch={"micro": 3}, routes=(1,), sizes=ONE),
    "bf16": Variant({"dtype": "bf16"}, batch={"micro": 3}, tolerance=0.12),
    "bf16 checkpointed": Variant({"dtype": "bf16", "checkpointing": True}, batch={"max_tokens": 30}, tolerance=0.12),
}
