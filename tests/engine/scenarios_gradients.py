"""Gradients of mixed batches, and log-probs of the forward passes beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.engine.rollouts import PLAIN, RICH, Rollout, routed
from tests.engine.variants import TABLES, VARIANTS
from tests.engine.world import World, actor_loss, batch, parameters, scenario
from verl_grad_routing.training.own_gate import CURRENT


@scenario(1, 2)
def gradients(world: World) -> dict[str, Any]:
    """Of every variant: parameter name -> full gradient before clipping."""
    engines, found = {}, {}
    for name, variant in VARIANTS.items():
        if world.size not in variant.sizes:
            continue
        key = repr(variant.engine)
        if key not in engines:
            engines.clear()
            engines[key] = world.engine(**variant.engine)
        options = {**variant.batch, "table": TABLES[variant.table]}
        found[name] = world.gradients(engines[key], variant.rows(world.rollouts), variant.loss, **options)
    return found


@scenario(1, 2)
def log_probs(world: World) -> dict[str, Any]:
    engine = world.engine()
    rows, flagged = world.rollouts, routed(world.rollouts, 1, 2)
    before = parameters(engine)
    found: dict[str, Any] = {
        "plain": world.infer(engine, rows, table=None)["log_probs"],
        "padded": world.infer(engine, rows, table=None, packed=False, micro=2)["log_probs"],
        "updates masked": world.infer(engine, flagged)["log_probs"],
        "gated": world.infer(engine, rows)["log_probs"],
        "gated padded": world.infer(engine, rows, packed=False)["log_probs"],
        "ablated": world.infer(engine, rows, table=None, ablate_quarantine=True)["log_probs"],
        "after ablated": world.infer(engine, rows, table=None)["log_probs"],
    }
    with engine.disable_adapter():
        found["base"] = world.infer(engine, rows, table=None)["log_probs"]
    found["after base"] = world.infer(engine, rows, table=None)["log_probs"]
    found["trained after base"] = world.gradients(engine, rows, micro=3)
    found["kept"] = all((value == before[name]).all() for name, value in parameters(engine).items())
    return found


@scenario(1, 2)
def training_forward(world: World) -> dict[str, Any]:
    """A training pass's own log-probs under other update masks, and the ratio against its own old log-probs."""
    engine = world.engine()
    found: dict[str, Any] = {}
    for name, routes in (("absorbed", (1,)), ("routed", (2,)), ("mixed", (1, 2))):
        rows = world.mine(routed(world.rollouts, *routes))
        found[name] = _training_log_probs(world, engine, rows)
    gated = world.infer(engine, world.rollouts, micro=3)["log_probs"]
    rows = [replace(row, old_log_probs=own) for row, own in zip(world.rollouts, gated, strict=True)]
    rich = world.infer(engine, world.rollouts, loss=RICH, micro=3)["log_probs"]
    right = [replace(row, old_log_probs=own) for row, own in zip(world.rollouts, rich, strict=True)]
    wrong = [replace(row, old_log_probs=row.old_log_probs - (row.route == 0) * 0.15) for row in right]
    for feed, options in (("packed", {"micro": 3}), ("padded", {"micro": 3, "packed": False})):
        found[f"given old log-probs {feed}"] = world.gradients(engine, right, RICH, **options)
        found[f"current old log-probs {feed}"] = world.gradients(engine, wrong, RICH, **options, **{CURRENT: True})
    found["wrong old log-probs packed"] = world.gradients(engine, wrong, RICH, micro=3)
    metrics = world.train(engine, rows, micro=3)
    found["kl of the first step"] = metrics["actor/ppo_kl"]
    return found


def _training_log_probs(world: World, engine: Any, rows: list[Rollout]) -> list[Any]:
    with engine.train_mode():
        data = batch(rows, len(world.rollouts), micro=3, return_model_output=True)
        output = engine.forward_backward_batch(data, actor_loss(PLAIN))
    return list(output["model_output"]["log_probs"].unbind())
