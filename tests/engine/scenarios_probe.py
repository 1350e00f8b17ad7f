"""Activations read in passes that run anyway."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.rollouts import HIDDEN, LAYERS, RICH
from tests.engine.world import World, scenario
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.probe import Pool, Project, Projections

FEEDS = {
    "packed": {},
    "rows of one": {"micro": 1},
    "padded": {"packed": False},
    "padded rows of two": {"packed": False, "micro": 2},
    "dynamic": {"max_tokens": 30},
    "dynamic padded": {"max_tokens": 30, "packed": False},
}


def vectors() -> torch.Tensor:
    """[2 directions, 2 layers, hidden]."""
    return torch.randn(2, 2, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@scenario(1, 2)
def probe(world: World) -> dict[str, Any]:
    """Pooled activations and projections of every row, fed in several ways, of several passes."""
    every, some = tuple(range(1, LAYERS + 1)), (LAYERS, 1)
    found: dict[str, Any] = {}
    for prefix, options in {"": {}, "bucket ": {"fsdp": {"pad_to_length": True, "pad_to_length_bucket": 32}}}.items():
        engine = world.engine(checkpointing=True, **options)
        for name, feed in FEEDS.items():
            if prefix and not feed.get("packed", True):
                continue  # only packed inputs are filled up
            output = world.infer(engine, world.rollouts, table=None, probe=Pool(every), **feed)
            found[prefix + name] = {"pooled": output["activation_pooled"]}
            output = world.infer(engine, world.rollouts, table=None, probe=Project(some, vectors()), **feed)
            found[prefix + name]["scores"] = output["activation_scores"]
    parts = (Project((2,), vectors()[:1, :1]), Project(some, vectors(), features=True))
    for feed in ("packed", "padded rows of two"):
        output = world.infer(engine, world.rollouts, table=None, probe=Projections(parts, "s"), **FEEDS[feed])
        found[f"features {feed}"] = {name: value for name, value in output.items() if name.startswith("s")}
    request = {"table": None, "probe": Pool(every)}
    found["ablated"] = world.infer(engine, world.rollouts, ablate_quarantine=True, **request)["activation_pooled"]
    with engine.disable_adapter():
        found["base"] = world.infer(engine, world.rollouts, **request)["activation_pooled"]
    for position in ("resp_last", "prompt_last"):
        for feed in ("packed", "padded rows of two"):
            output = world.infer(engine, world.rollouts, table=None, probe=Pool(every, position), **FEEDS[feed])
            found[f"{position} {feed}"] = output["activation_pooled"]
    found["outputs without a request"] = sorted(world.infer(engine, world.rollouts, table=None))
    found["heard in training"] = _heard_in_training(world, engine)
    found["out of range"] = [_told(world, engine, layer) for layer in (0, LAYERS + 1)]
    return found


def _heard_in_training(world: World, engine: Any) -> int:
    world.train(engine, world.rollouts, RICH, micro=3)
    return len(engine.probe._hidden)


def _told(world: World, engine: Any, layer: int) -> str:
    try:
        world.infer(engine, world.rollouts, table=None, probe=Pool((layer,)))
    except UserError as error:
        return str(error)
    return "nothing was raised"
