"""What leaves the engine, and what comes back from disk."""

from __future__ import annotations

import json
from typing import Any

from tests.engine.rollouts import ABSORB, KEEP, ROUTE, routed
from tests.engine.world import World, full, parameters, scenario, state
from verl_grad_routing.errors import UserError

EXPORTS = {"joined": ("deployed", "quarantine"), "deployed": ("deployed",), "quarantine": ("quarantine",)}


@scenario(1, 2)
def export(world: World) -> dict[str, Any]:
    """Adapters as the rollout gets them, and the log-probs they must reproduce."""
    found: dict[str, Any] = {}
    for ranks in ("equal", "unequal"):
        engine = world.engine(ranks)
        for name, blocks in EXPORTS.items():
            engine.exported_blocks = blocks
            tensors, config = engine.get_per_tensor_param(base_sync_done=True)
            found[f"{ranks} {name}"] = {"tensors": dict(tensors), "config": config}
        for name, ablated in (("joined", False), ("deployed", True)):
            log_probs = world.infer(engine, world.rollouts, table=None, ablate_quarantine=ablated)["log_probs"]
            found[f"{ranks} {name}"]["log_probs"] = log_probs
        tensors, _ = engine.get_per_tensor_param(base_sync_done=False)
        found[f"{ranks} base"] = {name: full(tensor) for name, tensor in tensors}
        found[f"{ranks} kept"] = parameters(engine)
    return found


@scenario(1, 2)
def merged(world: World) -> dict[str, Any]:
    """Merged weights of all exports and of the first again; the engine before, between and after."""
    engine = world.engine(merge=True)
    found: dict[str, Any] = {"log_probs": [], "states": [], "base": []}

    def look() -> None:
        found["log_probs"].append(world.infer(engine, world.rollouts, table=None)["log_probs"])
        found["states"].append(parameters(engine))
        base = {name: full(p) for name, p in engine.module.named_parameters() if ".lora_" not in name}
        found["base"].append(base)

    look()
    for name, blocks in {**EXPORTS, "again": EXPORTS["joined"]}.items():
        engine.exported_blocks = blocks
        tensors, config = engine.get_per_tensor_param(base_sync_done=name != "joined")
        found[name] = {key: tensor.clone() for key, tensor in tensors}
        found[f"{name} config"] = config
        look()
    found["gradients"] = world.gradients(engine, world.rollouts, micro=3)
    return found


@scenario(1, 2)
def checkpoint(world: World) -> dict[str, Any]:
    """A run interrupted after a save, and the same run not interrupted."""
    found: dict[str, Any] = {}
    for name, routes, options in (
        ("mixed", (KEEP, ABSORB, ROUTE), {}),
        ("quarantine never stepped", (KEEP,), {}),
        ("adapters only", (KEEP, ABSORB, ROUTE), {"checkpoint": {"save_lora_only": True}}),
    ):
        folder = str(world.scratch / name.replace(" ", "_"))
        engine = world.engine(**options)
        for _ in range(2):
            world.train(engine, routed(world.rollouts, *routes), micro=3)
            engine.lr_scheduler_step()
        engine.save_checkpoint(folder, global_step=2)
        saved = state(engine)
        world.train(engine, world.rollouts, micro=3)
        resumed = world.engine(**options)
        world.train(resumed, world.rollouts, micro=3)  # leaves momentum that must not survive
        resumed.load_checkpoint(folder, del_local_after_load=False)
        loaded, learning_rates = state(resumed), resumed.lr_scheduler.state_dict()
        world.train(resumed, world.rollouts, micro=3)
        found[name] = {
            "saved": saved,
            "loaded": loaded,
            "uninterrupted": state(engine),
            "resumed": state(resumed),
            "steps of the schedule": learning_rates["last_epoch"],
        }
    found["refusals"] = _refusals(world, str(world.scratch / "mixed"))
    return found


def _refusals(world: World, folder: str) -> dict[str, str]:
    """What loading says to another layout, and to a checkpoint without one."""
    others = {
        "deployed_rank": world.engine("unequal"),
        "scaling": world.engine(),
        "target_modules": world.engine(),
    }
    object.__setattr__(others["scaling"].model_config, "lora_alpha", 1)
    others["target_modules"].module.peft_config["default"].target_modules = {"q_proj"}
    told = {}
    for key, engine in others.items():
        before = state(engine)
        told[key] = _told(engine, folder)
        assert all((value == before[name]).all() for name, value in state(engine).items())
    told["none"] = _told(others["scaling"], str(world.scratch))
    with open(world.scratch / "mixed" / "grad_routing_blocks.json") as file:
        told["layout"] = json.load(file)
    return told


def _told(engine: Any, folder: str) -> str:
    try:
        engine.load_checkpoint(folder, del_local_after_load=False)
    except UserError as error:
        return str(error)
    return "nothing was raised"
