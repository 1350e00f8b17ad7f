"""How an engine starts when its initialisation reads the base weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.engine.rollouts import RANKS
from tests.engine.world import World, parameters, scenario, state
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import Contrast, save_contrast

FROM_PAIRS = ("corda", "scorda", "scorda_rev")


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


def drawn_contrast(inputs: Any) -> dict[str, torch.Tensor]:
    """Made-up differences of five pairs for every adapted layer."""
    generator = torch.Generator().manual_seed(7)
    differences = {}
    for name, value in inputs.adapters["equal"].items():
        module, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.default.")
        if found:
            differences[module] = torch.randn(5, value.shape[1], generator=generator) + 0.3
    return differences


@scenario(1, 2)
def start_from_pairs(world: World) -> dict[str, Any]:
    """The same with a contrast from a file; a run that is saved and resumed; a contrast of another model."""
    file, other = world.scratch / "contrast.safetensors", world.scratch / "other.safetensors"
    if world.rank == 0:
        differences = drawn_contrast(world.inputs)
        save_contrast(Contrast(differences, {"model": "m"}), file)
        save_contrast(Contrast(dict(list(differences.items())[1:]), {"model": "m"}), other)
    dist.barrier()
    found: dict[str, Any] = {}
    for init in FROM_PAIRS:
        blocks = {"init": init, "contrast": str(file)}
        engine = world.engine(blocks=blocks, as_initialised=True)
        log_probs = world.infer(engine, world.rollouts, table=None)["log_probs"]
        found[init] = {"parameters": parameters(engine), "log_probs": log_probs}
    world.train(engine, world.rollouts, micro=3)
    engine.save_checkpoint(folder := str(world.scratch / "started"), global_step=1)
    dist.barrier()
    resumed = world.engine(blocks=blocks, as_initialised=True)
    resumed.load_checkpoint(folder, del_local_after_load=False)
    for one in (engine, resumed):
        world.train(one, world.rollouts, micro=3)
    found["uninterrupted"], found["resumed"] = state(engine), state(resumed)
    try:
        world.engine(blocks={**blocks, "contrast": str(other)}, as_initialised=True)
        found["told"] = ""
    except UserError as error:
        found["told"] = str(error)
    return found
