"""Bottleneck coordinates of gradients and activations through the engine: packed, padded, on several ranks."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tests.engine.rollouts import RICH, Rollout
from tests.engine.scenarios_probe import FEEDS
from tests.engine.world import World, adapters_of, batch, scenario, state
from verl_grad_routing.bench.kernel import peak_memory
from verl_grad_routing.bottleneck import Bottleneck, digest
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.bottleneck_step import READ, ReadGradients
from verl_grad_routing.training.probe import Pool, Project

# the MLP's modules too, and not the first layer: the backward pass ends before it
SVD = Bottleneck(layers=(2, 3), targets=("q_proj", "o_proj", "down_proj"), rank=5, basis="svd")
LORA = Bottleneck(layers=(1, 3), targets=("v_proj", "up_proj"), rank=4, basis="lora", seed=3)
DIRECTIONS = 2


def vectors(bottleneck: Bottleneck) -> torch.Tensor:
    """[D, M, r]."""
    modules = len(bottleneck.layers) * len(bottleneck.targets)
    return torch.randn(DIRECTIONS, modules, bottleneck.rank, generator=torch.Generator().manual_seed(4))


def taken(
    world: World, engine: Any, rows: list[Rollout], asked: ReadGradients, bare: bool = False, **feed: Any
) -> torch.Tensor:
    """What the worker would be told of ``rows``, gathered from all ranks; ``bare`` without adapters."""
    own = world.mine(rows)
    data = batch(own, len(rows), table=None, **feed, **{READ: asked})
    with engine.eval_mode(), engine.disable_adapter() if bare else nullcontext():
        output = engine.infer_batch(data)["model_output"]
    assert sorted(output) == [READ]
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, list(output[READ].unbind()))
    return torch.stack([everyone[i % world.size][i // world.size] for i in range(len(rows))])


@scenario(1, 2)
def bottleneck(world: World) -> dict[str, Any]:
    rows, ablated = world.rollouts, {"ablate_quarantine": True}
    found: dict[str, Any] = {}
    kept = world.engine(fsdp={"pad_to_length": True, "pad_to_length_bucket": 32})  # and its activations are kept
    for name in ("packed", "padded"):
        found[f"kept {name}"] = taken(world, kept, rows, ReadGradients(SVD), **ablated, **FEEDS[name])
    engine = world.engine(checkpointing=True)
    hooks = _hooks(engine)
    for name, feed in FEEDS.items():
        found[name] = taken(world, engine, rows, ReadGradients(SVD), **ablated, **feed)
    found["reference"] = taken(world, engine, rows, ReadGradients(SVD), bare=True, micro=3)
    found["lora"] = taken(world, engine, rows, ReadGradients(LORA), micro=3, **ablated)
    for cosine in (False, True):
        asked = ReadGradients(SVD, vectors(SVD), cosine)
        found[f"scores {cosine}"] = taken(world, engine, rows, asked, micro=3, **ablated)
    found["bases"] = {name: tuple(b) for name, b in engine.probe.bases.of(SVD).items()}
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, digest(engine.probe.bases.of(SVD)))
    found["digests"] = everyone
    for name, feed in FEEDS.items():
        request = Pool((), bottleneck=SVD)
        found[f"activations {name}"] = world.infer(engine, rows, table=None, probe=request, **feed)["activation_pooled"]
    request = Project((), vectors(SVD), bottleneck=SVD)
    found["activation scores"] = world.infer(engine, rows, table=None, probe=request, micro=3)["activation_scores"]
    found["hooks left"] = _hooks(engine) - hooks
    found["peaks"] = _peaks(world, engine)
    found["out of range"] = _refused(world, engine)
    found["trained"] = _what_is_left(world)
    return found


def _hooks(engine: Any) -> int:
    return sum(len(module._forward_hooks) for module in engine.module.modules())


def _peaks(world: World, engine: Any) -> dict[int, int]:
    """Bytes alive at once while so many times the rollouts are scored, in micro-batches of three."""
    asked, peaks = ReadGradients(SVD, vectors(SVD)), {}
    for times in (1, 4):
        rows = world.rollouts * times
        data = batch(world.mine(rows), len(rows), table=None, micro=3, **{READ: asked})
        with engine.eval_mode():
            peaks[times] = peak_memory(partial(engine.infer_batch, data), torch.device("cpu"))
    return peaks


def _refused(world: World, engine: Any) -> str:
    try:
        taken(world, engine, world.rollouts, ReadGradients(Bottleneck((2,), ("k_proj",), 33, "svd")))
    except UserError as error:
        return str(error)
    return "nothing was raised"


def _what_is_left(world: World) -> dict[str, Any]:
    """A training step with and without scores taken before it: every parameter and all optimizer state."""
    ends = {}
    left: list[str] = []
    asked = ReadGradients(SVD, vectors(SVD))
    for name in ("with", "without"):
        engine = world.engine(checkpointing=True)
        if name == "with":
            before = state(engine)
            taken(world, engine, world.rollouts, asked, micro=3, ablate_quarantine=True)
            after = state(engine)
            left += [key for key, value in before.items() if not torch.equal(value, after[key])]
            left += [key for key, p in adapters_of(engine).items() if p.grad is not None]
            left += [key for key, module in engine.module.named_modules() if module.training]
        world.train(engine, world.rollouts, RICH, micro=3)
        ends[name] = state(engine)
    return {"ends": ends, "left": left}
