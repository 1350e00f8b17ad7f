"""Routes of tokens in a real engine: gradients, log-probs, steps, scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.engine.rollouts import (
    ABSORB,
    HIDDEN,
    KEEP,
    LAYERS,
    PLAIN,
    RICH,
    ROUTE,
    Loss,
    Rollout,
    with_token_routes,
    with_token_weights,
)
from tests.engine.scenarios_dense import engine as dense_engine
from tests.engine.scenarios_dense import table
from tests.engine.world import World, scenario, state
from verl_grad_routing.routing import ACTIVATION_MASKING, DEFAULT, STRICT
from verl_grad_routing.training.own_gate import CURRENT
from verl_grad_routing.training.probe import Project, Projections

# name -> (engine options, feed, loss, table)
FEEDS: dict[str, tuple[dict, dict, Loss, Any]] = {
    "packed": ({}, {}, PLAIN, DEFAULT),
    "packed rows of one": ({}, {"micro": 1}, PLAIN, DEFAULT),
    "padded": ({}, {"packed": False}, PLAIN, DEFAULT),
    "padded rows of two": ({}, {"packed": False, "micro": 2}, RICH, DEFAULT),
    "dynamic": ({}, {"max_tokens": 30}, RICH, DEFAULT),
    "weights": ({}, {"micro": 3, "weighted": True}, PLAIN, DEFAULT),
    "strict": ({}, {"micro": 3}, PLAIN, STRICT),
    "activation masking": ({}, {"micro": 3}, PLAIN, ACTIVATION_MASKING),
    "checkpointed": ({"checkpointing": True}, {"micro": 3}, PLAIN, DEFAULT),
    "checkpointed padded": ({"checkpointing": True}, {"micro": 2, "packed": False}, RICH, DEFAULT),
    "buckets": ({"fsdp": {"pad_to_length": True, "pad_to_length_bucket": 32}}, {"micro": 3}, PLAIN, DEFAULT),
}
DENSE_FEEDS: dict[str, tuple[dict, dict, Loss, Any]] = {
    "packed": ({}, {"micro": 3}, PLAIN, DEFAULT),
    "padded": ({}, {"micro": 2, "packed": False}, RICH, DEFAULT),
    "checkpointed": ({"checkpointing": True}, {"micro": 3}, PLAIN, DEFAULT),
    "cloud": ({}, {"micro": 3}, PLAIN, table("cloud", alpha=-0.75)),
}


@scenario(1, 2)
def token_gradients(world: World) -> dict[str, Any]:
    rows, engines, found = with_token_routes(world.rollouts), {}, {}
    for name, (options, feed, loss, masks) in FEEDS.items():
        if repr(options) not in engines:
            engines.clear()
            engines[repr(options)] = world.engine(**options)
        found[name] = world.gradients(engines[repr(options)], rows, loss, table=masks, **feed)
    return found


@scenario(1, 2)
def token_dense_gradients(world: World) -> dict[str, Any]:
    rows, engine, found = with_token_routes(world.rollouts), dense_engine(world), {}
    for name, (options, feed, loss, masks) in DENSE_FEEDS.items():
        one = dense_engine(world, **options) if options else engine
        found[name] = world.gradients(one, rows, loss, table=masks, **feed)
    alpha = table("cloud", alpha=-0.75)
    for name, feed in {"weights": {"micro": 3}, "weights padded": {"micro": 2, "packed": False}}.items():
        found[name] = world.gradients(engine, with_token_weights(world.rollouts), table=alpha, **feed)
    checkpointed = dense_engine(world, checkpointing=True)
    found["weights checkpointed"] = world.gradients(
        checkpointed, with_token_weights(world.rollouts), table=alpha, micro=3
    )
    found["weights and routes"] = world.gradients(engine, with_token_weights(rows), table=alpha, micro=3)
    off_target = table("cloud", alpha=-0.75, off_target=0.0)
    found["weights off target"] = world.gradients(engine, with_token_weights(rows), table=off_target, micro=3)
    flat = [replace(row, token_weights=(0.0,) * len(row.tokens)) for row in world.rollouts]
    found["weights of zero"] = world.gradients(engine, flat, table=alpha, micro=3)
    found["no weights"] = world.gradients(engine, world.rollouts, table=alpha, micro=3)
    return found


def uniform(rows: list[Rollout], route: int | None = None) -> list[Rollout]:
    """Every token with its rollout's own route (or all with ``route``)."""
    own = [row if route is None else replace(row, route=route) for row in rows]
    return [replace(row, token_routes=(row.route,) * len(row.response)) for row in own]


@scenario(1, 2)
def token_steps(world: World) -> dict[str, Any]:
    """Off-switches, masses, a batch that routes every token, old log-probs under the tokens' own gates."""
    engine, rows, found = world.engine(), world.rollouts, {}
    for name, feed in {"packed": {"micro": 3}, "padded": {"micro": 2, "packed": False}}.items():
        for kind, given in {
            "absorb": [replace(row, route=ABSORB) for row in rows],
            "absorb by token": uniform(rows, ABSORB),
            "rollouts": rows,
            "rollouts by token": uniform(rows),
        }.items():
            found[f"{kind} {name}"] = world.gradients(engine, given, **feed)
    mixed = with_token_routes(rows)
    stepped = world.engine()
    found["mass"] = world.train(stepped, mixed, micro=3)  # and there is an optimizer state to leave alone
    before = state(stepped)
    found["all routed"] = before, world.train(stepped, uniform(rows, ROUTE), micro=3), state(stepped)
    found["log_probs"] = world.infer(engine, mixed, micro=3)["log_probs"]
    found["log_probs padded"] = world.infer(engine, mixed, packed=False, micro=2)["log_probs"]
    found["plain"] = world.infer(engine, rows, table=None)["log_probs"]
    rich = world.infer(engine, mixed, loss=RICH, micro=3)["log_probs"]
    right = [replace(row, old_log_probs=own) for row, own in zip(mixed, rich, strict=True)]
    wrong = [replace(row, old_log_probs=row.old_log_probs - 0.15 * any_kept(row)) for row in right]
    for name, feed in {"packed": {"micro": 3}, "padded": {"micro": 3, "packed": False}}.items():
        found[f"given old {name}"] = world.gradients(engine, right, RICH, **feed)
        found[f"current old {name}"] = world.gradients(engine, wrong, RICH, **feed, **{CURRENT: True})
    found["wrong old"] = world.gradients(engine, wrong, RICH, micro=3)
    return found


def any_kept(row: Rollout) -> bool:
    return KEEP in (row.route, *(row.token_routes or ()))


def vectors() -> torch.Tensor:
    """[1 direction, 2 layers, hidden]."""
    return torch.randn(1, 2, HIDDEN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@scenario(1, 2)
def token_scores(world: World) -> dict[str, Any]:
    engine, layers, found = world.engine(), (LAYERS, 1), {}
    feeds = {
        "packed": {},
        "padded": {"packed": False},
        "padded rows of two": {"packed": False, "micro": 2},
        "dynamic": {"max_tokens": 30},
    }
    for name, feed in feeds.items():
        for kind in ("projection", "cosine"):
            part = Project(layers, vectors(), tokens=kind)
            output = world.infer(engine, world.rollouts, table=None, probe=Projections((part,), "found"), **feed)
            found[f"{kind} {name}"] = {"tokens": output["found_tokens"], "rollouts": output["found"]}
    part = Project(layers, vectors())
    output = world.infer(engine, world.rollouts, table=None, probe=Projections((part,), "found"))
    found["without"] = {"columns": sorted(output), "rollouts": output["found"]}
    return found
