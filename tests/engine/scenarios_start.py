"""How an engine starts when its initialisation reads the base weights."""

from __future__ import annotations

from typing import Any

from tests.engine.rollouts import RANKS
from tests.engine.world import World, parameters, scenario


@scenario(1, 2)
def start(world: World) -> dict[str, Any]:
    """Adapters of a fresh engine with ``pissa_split``, its log-probs, and what a step moves."""
    found: dict[str, Any] = {}
    for ranks in RANKS:
        engine = world.engine(ranks, blocks={"init": "pissa_split"}, as_initialised=True)
        log_probs = world.infer(engine, world.rollouts, table=None)["log_probs"]
        before = parameters(engine)
        metrics = world.train(engine, world.rollouts, micro=3)
        found[ranks] = {"parameters": before, "log_probs": log_probs, "stepped": parameters(engine), "metrics": metrics}
    return found
