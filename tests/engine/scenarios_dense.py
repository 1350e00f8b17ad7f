"""Dense blocks in a real engine: gradients, steps, exports, checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.dense_reference import SETTINGS, WEIGHTS
from tests.engine.rollouts import KEEP, PLAIN, RICH, ROUTE, Loss, routed
from tests.engine.world import World, full, parameters, scenario
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions import INTERVENTIONS
from verl_grad_routing.routing import DEFAULT

CLIP = 0.05  # below the gradient norm of both blocks
PAPER_SHARED = ["embeddings", "head", "norms", "output_biases", "other_layers"]


def table(name: str, **settings: Any) -> Any:
    return INTERVENTIONS.build({"name": name, **settings}, "test").table


# name -> (engine options, feed, loss, table, shared)
FEEDS: dict[str, tuple[dict, dict, Loss, Any, list[str]]] = {
    "plain": ({}, {"micro": 3}, PLAIN, DEFAULT, []),
    "padded": ({}, {"micro": 2, "packed": False}, RICH, DEFAULT, []),
    "dynamic": ({}, {"max_tokens": 40}, RICH, DEFAULT, []),
    "checkpointed": ({"checkpointing": True}, {"micro": 3}, PLAIN, DEFAULT, []),
    "weights": ({}, {"micro": 3, "weighted": True}, PLAIN, DEFAULT, ["norms"]),
    "shared": ({}, {"micro": 3}, PLAIN, DEFAULT, ["embeddings", "head", "norms", "output_biases"]),
    "reduced every time": (
        {"fsdp": {"use_no_sync_for_gradient_accumulation": False}},
        {"micro": 2},
        PLAIN,
        DEFAULT,
        [],
    ),
    "gradient routing": ({}, {"micro": 3}, PLAIN, table("sgtm", variant="gradient_routing"), []),
    "activation masking": ({}, {"micro": 3}, PLAIN, table("sgtm", variant="activation_masking"), PAPER_SHARED),
    "cloud": ({}, {"micro": 3}, PLAIN, table("cloud", alpha=-0.75), []),
    "gradient routing, checkpointed": (
        {"checkpointing": True},
        {"micro": 3},
        PLAIN,
        table("sgtm", variant="gradient_routing"),
        [],
    ),
    "activation masking, checkpointed": (
        {"checkpointing": True},
        {"micro": 3},
        PLAIN,
        table("sgtm", variant="activation_masking"),
        PAPER_SHARED,
    ),
    "cloud, checkpointed": ({"checkpointing": True}, {"micro": 3}, PLAIN, table("cloud", alpha=-0.75), []),
    "cloud, weights of units": (
        {"checkpointing": True, "weights": WEIGHTS},
        {"micro": 3},
        PLAIN,
        table("cloud", alpha=-0.75),
        [],
    ),
    "bf16": ({"dtype": "bf16"}, {"micro": 3}, PLAIN, DEFAULT, []),
}


OPTIM: dict[str, dict[str, Any]] = {
    "own rates and moments": {"lr_ratio_quarantine": 3.0, "betas_quarantine": [0.5, 0.9], "weight_decay_deployed": 0.4},
    "towards the start": {"decay_to_start": True, "weight_decay_quarantine": 2.0},
    "jointly": {"clip_jointly": True},
    "inactive stepped": {"freeze_inactive": False},
}


def engine(world: World, shared: list[str] | tuple = (), own: dict[str, Any] | None = None, **options: Any) -> Any:
    units = {**SETTINGS["units"], "shared": list(shared), "weights": options.pop("weights", [])}
    blocks = {**SETTINGS, "units": units, "optim": own or {}}
    return world.engine(blocks=blocks, **options)


def block_states(world: World, one: Any) -> dict[str, dict[str, Tensor]]:
    """Of every block: every rank's pieces of parameters, and the optimizer's state of each."""
    one.block_step.parts.bind()
    names = {id(p): name for name, p in one.module.named_parameters()}
    own: dict[str, dict[str, Tensor]] = {}
    for piece in one.block_step.parts.pieces:
        key = f"rank {world.rank} {names[id(piece.parameter)]} {piece.run}"
        found = own.setdefault(piece.block, {})
        found[key] = piece.handle.detach().clone()
        for entry, value in one.optimizer.state.get(piece.handle, {}).items():
            found[f"{key} {entry}"] = torch.as_tensor(value).clone()
    one.block_step.parts.release()
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, own)
    return {b: {k: v for part in everyone for k, v in part.get(b, {}).items()} for b in one.block_step.blocks}


@scenario(1, 2)
def dense_gradients(world: World) -> dict[str, Any]:
    return {
        name: world.gradients(engine(world, shared, **options), world.rollouts, loss, table=masks, **feed)
        for name, (options, feed, loss, masks, shared) in FEEDS.items()
    }


@scenario(1, 2)
def dense_steps(world: World) -> dict[str, Any]:
    """Two mixed steps, one all flagged, one all trusted, one mixed again."""
    one = engine(world, optim={"clip_grad": CLIP})
    kinds = (None, None, ROUTE, KEEP, None)
    states, metrics, values = [block_states(world, one)], [], []
    for kind in kinds:
        rows = world.rollouts if kind is None else routed(world.rollouts, kind)
        metrics.append(world.train(one, rows, micro=3))
        states.append(block_states(world, one))
        values.append(parameters(one))
    both = engine(world, ["norms"], optim={"clip_grad": CLIP})
    before = block_states(world, both)
    world.train(both, routed(world.rollouts, ROUTE), micro=3)
    return {"states": states, "metrics": metrics, "values": values, "shared": (before, block_states(world, both))}


@scenario(1, 2)
def dense_optim(world: World) -> dict[str, Any]:
    """Three steps with blocks optimised apart: mixed, all flagged, mixed."""
    found: dict[str, Any] = {}
    for name, own in OPTIM.items():
        one = engine(world, own=own, optim={"clip_grad": CLIP})
        values = []
        for kind in (None, ROUTE, None):
            world.train(one, world.rollouts if kind is None else routed(world.rollouts, kind), micro=3)
            values.append(parameters(one))
        found[name] = values
    betas, decay = [0.5, 0.9], 0.4
    groups = ("deployed", "quarantine", "shared")
    apart = {f"betas_{group}": betas for group in groups} | {f"weight_decay_{group}": decay for group in groups}
    for name, of_blocks, of_all in (
        ("each alone", apart, {}),
        ("actor's", {}, {"betas": betas, "weight_decay": decay}),
        ("blocks alone", {key: value for key, value in apart.items() if "shared" not in key}, {}),
    ):
        shares = engine(world, ["norms"], own=of_blocks, optim=of_all)
        for _ in range(2):
            world.train(shares, world.rollouts, micro=3)
        found[name] = block_states(world, shares)
    folder = str(world.scratch / "dense-optim")
    one.save_checkpoint(folder, global_step=1)
    dist.barrier()
    try:
        engine(world, own=OPTIM["towards the start"]).load_checkpoint(folder, del_local_after_load=False)
    except UserError as error:
        found["refused"] = str(error)
    return found


@scenario(1, 2)
def dense_export(world: World) -> dict[str, Any]:
    one = engine(world)
    world.train(one, world.rollouts, micro=3)
    found: dict[str, Any] = {"trained": parameters(one)}
    for name, blocks in {
        "both": ("deployed", "quarantine"),
        "deployed": ("deployed",),
        "again": ("deployed", "quarantine"),
    }.items():
        one.exported_blocks = blocks
        tensors, configuration = one.get_per_tensor_param(base_sync_done=True)
        assert configuration is None
        found[name] = {key: full(tensor) for key, tensor in tensors}
    one.exported_blocks = ("quarantine",)
    try:
        one.get_per_tensor_param()
    except UserError as error:
        found["refused"] = str(error)
    infer = {"plain": {}, "ablated": {"ablate_quarantine": True}}
    found["log_probs"] = {
        name: world.infer(one, world.rollouts, table=None, **how)["log_probs"] for name, how in infer.items()
    }
    found["log_probs"]["gated"] = world.infer(one, world.rollouts, table=DEFAULT)["log_probs"]
    return found


@scenario(1, 2)
def dense_checkpoint(world: World) -> dict[str, Any]:
    folder = str(world.scratch / "dense")
    one = engine(world)
    for routes in ((0, 1, 2), (ROUTE,)):  # the blocks have been stepped unequally often
        world.train(one, routed(world.rollouts, *routes), micro=3)
    one.save_checkpoint(folder, global_step=2)
    saved = block_states(world, one)
    world.train(one, world.rollouts, micro=3)
    other = engine(world)
    world.train(other, world.rollouts, micro=3)
    other.load_checkpoint(folder, del_local_after_load=False)
    loaded = block_states(world, other)
    world.train(other, world.rollouts, micro=3)
    found = {"saved": saved, "loaded": loaded, "on": block_states(world, one), "resumed": block_states(world, other)}
    try:
        engine(world, ["norms"]).load_checkpoint(folder, del_local_after_load=False)
    except UserError as error:
        found["refused"] = str(error)
    return found
