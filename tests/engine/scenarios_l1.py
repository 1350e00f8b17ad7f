"""L1 on the quarantine's bottleneck activations in mixed batches."""

from __future__ import annotations

from typing import Any

from tests.engine.variants import VARIANTS
from tests.engine.world import World, scenario, state
from verl_grad_routing import routing

WEIGHT = 0.05
L1_VARIANTS = ("rich loss", "rich loss padded", "dynamic", "checkpointed", "weights", "packed to buckets", "replicated")
L1_VARIANTS += ("strict table",)


@scenario(1, 2)
def l1(world: World) -> dict[str, Any]:
    """Gradients of every variant; metrics of a step; states with weight 0 and without the hook."""
    found: dict[str, Any] = {}
    for name in L1_VARIANTS:
        variant = VARIANTS[name]
        if world.size not in variant.sizes:
            continue
        engine = world.engine(blocks={"hooks": [{"name": "l1_activations", "weight": WEIGHT}]}, **variant.engine)
        options = {**variant.batch, "table": getattr(routing, variant.table)}
        found[name] = world.gradients(engine, variant.rows(world.rollouts), variant.loss, **options)
        if name == "checkpointed":
            world.infer(engine, world.rollouts)
            engine.optimizer_zero_grad()
            world.train(engine, world.rollouts, micro=3)  # what the first pass left is not counted again
            found["metrics"] = world.train(world.engine(**_with(), checkpointing=True), world.rollouts, micro=3)
            uphill = _with({"name": "regularize_gradient"})
            twice = world.engine(**uphill)
            world.train(twice, world.rollouts, micro=3)
            found["metrics uphill"] = world.train(twice, world.rollouts, micro=3)
            plain = world.engine(**_with({"name": "regularize_gradient", "gamma": 0.0}))
            world.train(plain, world.rollouts, micro=3)
            found["metrics second step"] = world.train(plain, world.rollouts, micro=3)
    off = {"hooks": [{"name": "l1_activations", "weight": 0.0}]}
    for name, blocks in (("off", off), ("none", {})):
        engine = world.engine(blocks=blocks)
        world.train(engine, world.rollouts, micro=3)
        found[name] = state(engine)
    return found


def _with(*others: dict[str, Any]) -> dict[str, Any]:
    return {"blocks": {"hooks": [{"name": "l1_activations", "weight": WEIGHT}, *others]}}
