"""Confessions beside answers in a real engine: two losses, each over its own counts of the global mini-batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from verl.utils.metric import Metric

from tests.engine.rollouts import PLAIN, RICH, Rollout
from tests.engine.world import World, scenario

WEIGHT = 0.4
LOSSES = {"token-mean": PLAIN, "seq-mean-token-mean": RICH}


def mixed(rollouts: list[Rollout]) -> list[Rollout]:
    """Every third row is a confession, rows that count nothing among the answers."""
    return [replace(row, confession=index % 3 == 1) for index, row in enumerate(rollouts)]


def padded(rollouts: list[Rollout]) -> list[Rollout]:
    """As ``mixed``, with two answers in the place of which verl has padding."""
    return [
        replace(row.silent(), padding=True) if index in (0, 5) else row for index, row in enumerate(mixed(rollouts))
    ]


@scenario(1, 2)
def confessions(world: World) -> dict[str, Any]:
    """Gradients with some confessions, with none, with nothing else, and without the column."""
    rows, engine = mixed(world.rollouts), world.engine()
    answers = [replace(row, confession=False) for row in rows]
    asked = {"confessing": True, "confession_weight": WEIGHT, "micro": 3}
    found: dict[str, Any] = {name: world.gradients(engine, rows, loss, **asked) for name, loss in LOSSES.items()}
    found["padded"] = world.gradients(engine, rows, RICH, packed=False, **asked)
    votes = {"confessing": True, "micro": 3}
    for name, loss in LOSSES.items():
        found[f"votes, {name}"] = world.gradients(engine, padded(world.rollouts), loss, **votes)
    found["no confession"] = world.gradients(engine, answers, RICH, **asked)
    found["no column"] = world.gradients(engine, answers, RICH, micro=3)
    metrics = world.train(engine, rows, RICH, **asked)
    found["metrics"] = {
        key: value.aggregate() if isinstance(value, Metric) else value for key, value in metrics.items()
    }
    return found
