"""An expanded model in a real engine: gradients, steps, a checkpoint to be contracted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from tests.engine.rollouts import KEEP, PLAIN, ROUTE, routed
from tests.engine.scenarios_dense import block_states
from tests.engine.world import World, parameters, scenario
from verl_grad_routing.deploy.expansion import Expand, expand
from verl_grad_routing.interventions import INTERVENTIONS

UNITS, LAYERS = 10, "0,2"
ERA = INTERVENTIONS.build({"name": "cloud", "alpha": -0.75, "off_target": 0.5}, "test").table
BLOCKS = {"kind": "dense", "units": {"mlp_units": "expanded"}}


def on_expanded(world: World) -> World:
    """The same world with the expanded model in the model's place, both sides of its new units random."""
    folder = world.scratch / "expanded"
    if world.rank == 0:
        expand(Expand(world.inputs.model_dir, UNITS, LAYERS, "random", seed=1), folder)
    dist.barrier()
    return replace(world, inputs=replace(world.inputs, model_dir=folder))


@scenario(1, 2)
def era(world: World) -> dict[str, Any]:
    own = on_expanded(world)
    checkpointed = own.engine(blocks=BLOCKS, checkpointing=True)
    recomputed = own.gradients(checkpointed, own.rollouts, PLAIN, table=ERA, micro=3)
    one = own.engine(blocks=BLOCKS)
    found: dict[str, Any] = {
        "model": own.inputs.model_dir,
        "gradients": own.gradients(one, own.rollouts, PLAIN, table=ERA, micro=3),
        "gradients, checkpointed": recomputed,
        "values": [parameters(one)],
        "metrics": [],
        "held": list(block_states(own, one)),
    }
    for kind in (None, ROUTE, KEEP):
        rows = own.rollouts if kind is None else routed(own.rollouts, kind)
        found["metrics"].append(own.train(one, rows, table=ERA, micro=3))
        found["values"].append(parameters(one))
    found["log_probs"] = own.infer(one, own.rollouts, table=None, ablate_quarantine=True)["log_probs"]
    folder = world.scratch / "era" / "global_step_3" / "actor"
    one.save_checkpoint(str(folder), global_step=3)
    return found | {"checkpoint": folder.parent}
