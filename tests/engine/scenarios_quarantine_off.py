"""Batches in which some rows were sampled with the quarantine off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.engine.rollouts import RICH, Rollout
from tests.engine.world import World, scenario
from verl_grad_routing.routing import DEFAULT, STRICT
from verl_grad_routing.training.masks import OFF_TABLE, SAMPLING_GATE
from verl_grad_routing.training.own_gate import CURRENT

FEEDS: dict[str, dict[str, Any]] = {"packed": {"micro": 3}, "padded": {"micro": 2, "packed": False}}


def half_off(rollouts: list[Rollout]) -> list[Rollout]:
    """Every route with and without the quarantine."""
    return [replace(row, off=bool((index // 3) % 2)) for index, row in enumerate(rollouts)]


@scenario(1, 2)
def quarantine_off(world: World) -> dict[str, Any]:
    engine, rows = world.engine(), half_off(world.rollouts)
    own = {OFF_TABLE: DEFAULT.without_quarantine()}
    found: dict[str, Any] = {}
    for feed, options in FEEDS.items():
        found[f"log-probs {feed}"] = world.infer(
            engine, rows, table=None, sampled=True, **{SAMPLING_GATE: True}, **options
        )["log_probs"]
        found[f"as sampled {feed}"] = world.gradients(engine, rows, RICH, sampled=True, **own, **options)
        found[f"as routed {feed}"] = world.gradients(engine, rows, RICH, sampled=True, **options)
    checkpointed = world.engine(checkpointing=True)
    found["as sampled checkpointed"] = world.gradients(checkpointed, rows, RICH, sampled=True, micro=3, **own)
    found["strict"] = world.gradients(
        engine, rows, sampled=True, table=STRICT, micro=3, **{OFF_TABLE: STRICT.without_quarantine()}
    )
    current = world.infer(engine, rows, table=DEFAULT, loss=RICH, micro=3)["log_probs"]
    # KEEP rows with both blocks bring their own old log-probs whatever they were given; the others keep what they have
    found["current"] = world.gradients(engine, rows, RICH, sampled=True, micro=3, **own, **{CURRENT: True})
    right = [
        replace(row, old_log_probs=own_log_probs) if row.route == 0 and not row.off else row
        for row, own_log_probs in zip(rows, current, strict=True)
    ]
    found["given"] = world.gradients(engine, right, RICH, sampled=True, micro=3, **own)
    found["wrong"] = world.gradients(engine, rows, RICH, sampled=True, micro=3, **own)
    on = [replace(row, off=False) for row in rows]
    found["all on"] = world.gradients(engine, on, RICH, sampled=True, micro=3, **own)
    found["no column"] = world.gradients(engine, on, RICH, micro=3)
    mass = world.train(engine, rows, sampled=True, micro=3, **own)
    found["mass"] = [mass[f"routing/mass_{block}"] for block in ("deployed", "quarantine")]
    found["tokens"] = torch.tensor([int(row.mask.sum()) for row in rows])
    return found
