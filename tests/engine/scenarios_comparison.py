"""Other methods in shadow: several detectors' activations in one pass, gradients compared without a step."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.engine.rollouts import ABSORB, KEEP, LAYERS, RICH, ROUTE, Rollout, routed
from tests.engine.scenarios_probe import FEEDS, vectors
from tests.engine.scenarios_quarantine_off import FEEDS as OFF_FEEDS
from tests.engine.scenarios_quarantine_off import half_off
from tests.engine.world import World, actor_loss, adapters_of, batch, scenario, state
from verl_grad_routing.routing import DEFAULT, STRICT
from verl_grad_routing.training.gradient_comparison import ASKED, COLUMNS, OLD_LOG_PROBS, Variant, compare_gradients
from verl_grad_routing.training.masks import OFF_TABLE, TABLE
from verl_grad_routing.training.probe import Project, Projections

TABLES = {"strict": STRICT}


def methods(rollouts: list[Rollout]) -> dict[str, list[Rollout]]:
    """The same rows as several methods would train on them; ``arm`` is the run's own."""
    arm = routed(rollouts, ABSORB, ROUTE, ABSORB)
    return {
        "arm": arm,
        "same": arm,
        "absorb": routed(rollouts, ABSORB),
        "strict": arm,
        "all routed": routed(rollouts, ROUTE),
        "screened": [row.silent() if i % 3 == 0 else row for i, row in enumerate(routed(rollouts, ABSORB))],
        "reversed": [row.scaled(-1.0) for row in arm],
        "kept": routed(rollouts, KEEP, ABSORB, ROUTE),
    }


def compared(world: World, engine: Any, rollouts: list[Rollout], stale: bool = False, **feed: Any) -> dict[str, float]:
    """As the worker is asked: one batch with every method's columns."""
    rows = methods(rollouts)
    mine = world.mine(rows["arm"])
    if stale:  # the run's own method has rewritten its old log-probs; shadows start from those that were sampled
        mine = [replace(row, old_log_probs=row.old_log_probs - 9.0) for row in mine]
    off = any(row.off for row in rollouts)
    data = batch(mine, len(rollouts), RICH, table=DEFAULT, sampled=off, **feed)
    variants = []
    for index, (name, changed) in enumerate(rows.items()):
        own = batch(world.mine(changed), len(rollouts), RICH, **feed)
        prefix = "" if name == "arm" else f"variant_{index}_"
        for column in COLUMNS if prefix else ():
            data[f"{prefix}{column}"] = own[column]
        table = TABLES.get(name, DEFAULT)
        tables = {TABLE: table, OFF_TABLE: table.without_quarantine()} if off else {TABLE: table}
        variants.append(Variant(name, prefix, tables))
    data[OLD_LOG_PROBS] = batch(world.mine(rows["arm"]), len(rollouts), RICH)["old_log_probs"]
    batch_settings = {"use_dynamic_bsz": False, "max_token_len_per_gpu": None, "micro_batch_size_per_gpu": 1}
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor(data, **{ASKED: tuple(variants)})
    worker = SimpleNamespace(
        engine=engine,
        loss_fn=actor_loss(RICH),
        model_config={"use_remove_padding": True},
        engine_config=SimpleNamespace(use_fused_kernels=False, **batch_settings),
    )
    return compare_gradients(worker, data)


def draws() -> list[float]:
    """The next numbers of every generator, which are then put back."""
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    random.setstate(python), np.random.set_state(numpy), torch.set_rng_state(torch_)
    return drawn


@scenario(1, 2)
def comparison(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    engine = world.engine()
    for name, feed in {"packed": {"micro": 3}, "padded": {"micro": 2, "packed": False}}.items():
        found[name] = compared(world, engine, world.rollouts, **feed)
    found["stale"] = compared(world, engine, world.rollouts, stale=True, micro=3)
    for name, feed in OFF_FEEDS.items():
        found[f"quarantine off {name}"] = compared(world, engine, half_off(world.rollouts), **feed)
    found["replicated"] = compared(world, world.engine(fsdp={"fsdp_size": 1}), world.rollouts, micro=3)
    found["projections"] = _projections(world, engine)
    found["left"] = _what_is_left(world)
    return found


def _projections(world: World, engine: Any) -> dict[str, Any]:
    """Two detectors' scores in one pass, and each alone."""
    parts = (Project((LAYERS, 1), vectors()), Project((2,), vectors()[:1, :1], "resp_last"))
    found = {}
    for feed_name, feed in FEEDS.items():
        asked = {"both": Projections(parts, "activation_scores_policy"), "first": parts[0], "second": parts[1]}
        outputs = {key: world.infer(engine, world.rollouts, table=None, probe=p, **feed) for key, p in asked.items()}
        both = outputs["both"]["activation_scores_policy"]
        first, second = (outputs[name]["activation_scores"] for name in ("first", "second"))
        alone = [torch.cat(rows) for rows in zip(first, second, strict=True)]
        found[feed_name] = {"both": both, "alone": alone, "columns": sorted(outputs["both"])}
    return found


def _what_is_left(world: World) -> dict[str, Any]:
    """Two training steps with and without a comparison before each: parameters, optimizer, random numbers, metrics."""
    ends, moved, metrics = {}, [], {}
    for name in ("with", "without"):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        engine = world.engine(checkpointing=True)
        for _ in range(2):
            if name == "with":
                before, drawn = state(engine), draws()
                compared(world, engine, world.rollouts, micro=3)
                moved += [key for key, value in state(engine).items() if not torch.equal(value, before[key])]
                moved += [key for key, p in adapters_of(engine).items() if p.grad is not None]
                moved += ["random numbers"] if draws() != drawn else []
            metrics[name] = world.train(engine, methods(world.rollouts)["kept"], RICH, micro=3)
        ends[name] = state(engine)
    return {"ends": ends, "moved": moved, "metrics": metrics}
