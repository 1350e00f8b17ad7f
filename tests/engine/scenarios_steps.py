"""Optimizer steps: what moves, by how much, and what must not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.engine.rollouts import ABSORB, KEEP, PLAIN, ROUTE, Rollout, routed
from tests.engine.world import World, batch, scenario, state
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import DEFAULT
from verl_grad_routing.training.block_step import BlockStep

CLIP = 0.05  # below the gradient norm of both blocks


@scenario(1, 2)
def freeze(world: World) -> dict[str, Any]:
    """States around batches that train one block alone, after steps that gave Adam momentum, with weight decay."""
    found = {}
    settings = {
        "fp32": ({}, {"micro": 3}),
        "padded": ({"ranks": "unequal"}, {"micro": 2, "packed": False}),
        "bf16 checkpointed": ({"dtype": "bf16", "checkpointing": True}, {"max_tokens": 30}),
    }
    for name, (options, feed) in settings.items():
        engine = world.engine(**options)
        for _ in range(2):
            world.train(engine, world.rollouts, **feed)
        states, metrics = [state(engine)], []
        for rows in (routed(world.rollouts, ROUTE), routed(world.rollouts, KEEP), _only(world.rollouts, KEEP)):
            metrics.append(world.train(engine, rows, **feed))
            states.append(state(engine))
        found[name] = {"states": states, "metrics": metrics}
    engine = world.engine()
    world.train(engine, routed(world.rollouts, ROUTE), micro=3)
    found["first step"] = state(engine)
    return found


def _only(rows: list[Rollout], route: int) -> list[Rollout]:
    """Rows of other routes stay, without a token that counts."""
    return [row if row.route == route else row.silent() for row in rows]


@scenario(1, 2)
def two_steps(world: World) -> dict[str, Any]:
    """States and metrics of two steps over the mixed batch, clipped."""
    engine = world.engine(optim={"clip_grad": CLIP})
    states, metrics = [state(engine)], []
    for _ in range(2):
        metrics.append(world.train(engine, world.rollouts, micro=3))
        states.append(state(engine))
    own_limits = {"clip_norm_deployed": 0.02, "clip_norm_quarantine": 1e6}
    engine = world.engine(optim={"clip_grad": CLIP}, blocks=own_limits)
    world.train(engine, world.rollouts, micro=3)
    found = {"states": states, "metrics": metrics, "own limits": state(engine)}
    if world.size == 2:
        engine = world.engine(optim={"clip_grad": CLIP}, fsdp={"fsdp_size": 1})
        replicated = world.train(engine, world.rollouts, micro=3)
        found["replicated"] = {"metrics": replicated, "state": state(engine)}
    return found


@scenario(1, 2)
def shared_clip(world: World) -> dict[str, Any]:
    """The same batch twice, the flagged rows' advantages a thousand times as large in the second."""
    found = {}
    loud = [row.scaled(1000) if row.route == ROUTE else row for row in world.rollouts]
    for name, rows in (("quiet", world.rollouts), ("loud", loud)):
        engine = world.engine(optim={"clip_grad": 1.0})
        found[name] = {"metrics": world.train(engine, rows, micro=3), "state": state(engine)}
    return found


def never() -> None:
    raise AssertionError("without a hook nothing asks for a second gradient")


@scenario(1)
def block_step_oracles(world: World) -> dict[str, Any]:
    """The step alone, on numbers small enough to do by hand."""
    deployed, quarantine = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    blocks = {"deployed": [deployed], "quarantine": [quarantine]}
    sgd = torch.optim.SGD([{"params": parameters} for parameters in blocks.values()], lr=1.0)
    step = BlockStep(sgd, blocks, {"deployed": 1.0, "quarantine": 1.0}, [])
    deployed.grad, quarantine.grad = torch.tensor([0.3, 0.0]), torch.tensor([0.0, 4.0])
    total = step([5.0, 7.0], never)
    clipped = {"deployed": deployed.detach().clone(), "quarantine": quarantine.detach().clone(), "total": total}

    momentum = torch.nn.Parameter(torch.ones(1))
    blocks = {"deployed": [momentum], "quarantine": [torch.nn.Parameter(torch.ones(1))]}
    groups = [{"params": parameters} for parameters in blocks.values()]
    adam = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    step = BlockStep(adam, blocks, {"deployed": 10.0, "quarantine": 10.0}, [])
    trajectory = []
    for gradient, mass in ((1.0, 1.0), (0.0, 0.0), (0.0, 1.0)):
        momentum.grad = torch.tensor([gradient])
        step([mass, 0.0], never)
        trajectory.append(momentum.item())
    poisoned = {}
    for name, gradient in (("deployed", float("nan")), ("quarantine", float("inf"))):
        for block, parameters in blocks.items():
            parameters[0].grad = torch.tensor([gradient if block == name else 1.0])
        before = [parameter.item() for parameters in blocks.values() for parameter in parameters]
        step([1.0, 1.0], never)
        poisoned[name] = (before, [parameter.item() for parameters in blocks.values() for parameter in parameters])
    return {"clipped": clipped, "trajectory": trajectory, "poisoned": poisoned}


@scenario(1, 2)
def mass(world: World) -> dict[str, Any]:
    """Whether a block is stepped, decided by tokens."""
    engine = world.engine()
    for _ in range(2):
        world.train(engine, world.rollouts, micro=3)
    mixed, found = world.rollouts, {}
    half = [replace(row, weight=0.0 if row.route == ROUTE else 0.5) for row in mixed]
    cases = {
        "advantages zero": ([row.scaled(0) for row in routed(mixed, ABSORB)], {}),
        "no tokens": ([row.silent() for row in mixed], {}),
        "weights zero": ([replace(row, weight=0.0) for row in mixed], {"weighted": True}),
        "flagged weights zero": ([row for row in half if row.route != ABSORB] * 2, {"weighted": True}),
        "half weights": (half, {"weighted": True}),
    }
    for name, (rows, options) in cases.items():
        before = state(engine)
        metrics = world.train(engine, rows, micro=2, **options)
        found[name] = {"before": before, "after": state(engine), "metrics": metrics}
    return found


@scenario(1, 2)
def not_finite(world: World) -> dict[str, Any]:
    """A step with a gradient that is no number, then an ordinary one; beside an engine that only took the latter."""
    found: dict[str, Any] = {}
    engine, control = world.engine(), world.engine()
    for one in (engine, control):
        world.train(one, world.rollouts, micro=3)
    for name, route, value in (("quarantine", ROUTE, float("inf")), ("deployed", KEEP, float("nan"))):
        bad = next(i for i, row in enumerate(world.rollouts) if row.route == route and row.mask.any())
        rows = [row.scaled(value) if i == bad else row for i, row in enumerate(world.rollouts)]
        before = state(engine)
        metrics = world.train(engine, rows, micro=3)
        found[name] = {"before": before, "after": state(engine), "metrics": metrics}
    for key, one in (("recovered", engine), ("control", control)):
        world.train(one, world.rollouts, micro=3)
        found[key] = state(one)
    return found


@scenario(1, 2)
def refusals(world: World) -> dict[str, Any]:
    """What a training batch without routes is told, and that the engine works afterwards."""
    engine, found = world.engine(), {}
    for name in ("route", "routing_table"):
        data = batch(world.mine(world.rollouts), len(world.rollouts), PLAIN)
        del data[name]
        found[name] = _told(lambda data=data: _train(engine, data))
    unknown = batch(world.mine(world.rollouts), len(world.rollouts), PLAIN, table=DEFAULT)
    unknown["route"] = torch.full_like(unknown["route"], 3)
    found["unknown"] = _told(lambda: _train(engine, unknown))
    world.train(engine, world.rollouts)
    return found


def _train(engine: Any, data: Any) -> None:
    with engine.train_mode():
        engine.train_batch(data, loss_function=None)


def _told(call: Any) -> tuple[str, str]:
    try:
        call()
    except UserError as error:
        return error.key, str(error)
    return "", "nothing was raised"
