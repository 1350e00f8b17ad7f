"""Gradient fingerprints through the engine: packed, padded, checkpointed, on several ranks; what they leave behind."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.rollouts import RICH, Rollout
from tests.engine.scenarios_probe import FEEDS
from tests.engine.world import World, adapters_of, batch, scenario, state
from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import GradientProbe
from verl_grad_routing.training.fingerprint_step import ASKED
from verl_grad_routing.training.probe import AdjacentCosines

# the MLP's modules too, and not the first layer: the backward pass ends before it
PROBE = GradientProbe(layers=(2, 3), targets=("q_proj", "o_proj", "down_proj"), rank=4, alpha=8.0, dim=256, seed=11)


def taken(world: World, engine: Any, rows: list[Rollout], **feed: Any) -> list[torch.Tensor]:
    """Fingerprints of ``rows`` as the worker takes them, gathered from all ranks."""
    import torch.distributed as dist

    own = world.mine(rows)
    data = batch(own, len(rows), table=None, **feed, **{ASKED: PROBE})
    with engine.eval_mode():
        output = engine.infer_batch(data)["model_output"]
    assert sorted(output) == ["fingerprints"]
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, list(output["fingerprints"].unbind()))
    return [everyone[i % world.size][i // world.size] for i in range(len(rows))]


@scenario(1, 2)
def fingerprints(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prefix, checkpointing in {"": True, "kept ": False}.items():
        engine = world.engine(checkpointing=checkpointing)
        for name, feed in FEEDS.items():
            found[prefix + name] = taken(world, engine, world.rollouts, **feed)
    bucketed = world.engine(fsdp={"pad_to_length": True, "pad_to_length_bucket": 32})
    found["bucket packed"] = taken(world, bucketed, world.rollouts)
    every = {"table": None, "probe": AdjacentCosines((1, 2, 3))}
    for name, feed in FEEDS.items():
        found[f"cosines {name}"] = world.infer(engine, world.rollouts, **every, **feed)["activation_pooled"]
    found["out of range"] = _refused(world, engine)
    found["trained"] = _what_is_left(world)
    return found


def _refused(world: World, engine: Any) -> str:
    data = batch(world.mine(world.rollouts), 12, table=None, **{ASKED: GradientProbe(layers=(4,))})
    try:
        with engine.eval_mode():
            engine.infer_batch(data)
    except UserError as error:
        return str(error)
    return "nothing was raised"


def _what_is_left(world: World) -> dict[str, Any]:
    """Two training steps with and without fingerprints taken before each: every parameter and all optimizer state."""
    ends = {}
    left: list[str] = []
    for name in ("with", "without"):
        engine = world.engine(checkpointing=True)
        for _ in range(2):
            if name == "with":
                before = state(engine)
                taken(world, engine, world.rollouts, micro=3)
                after = state(engine)
                left += [key for key, value in before.items() if not torch.equal(value, after[key])]
                left += [key for key, p in adapters_of(engine).items() if p.grad is not None]
                left += [key for key, module in engine.module.named_modules() if module.training]
            world.train(engine, world.rollouts, RICH, micro=3)
        ends[name] = state(engine)
    return {"ends": ends, "left": left}
