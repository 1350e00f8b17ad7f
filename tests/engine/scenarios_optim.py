"""How blocks are optimised: two steps over the mixed batch under every setting, and resuming them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tests.engine.world import World, scenario, state
from verl_grad_routing.errors import UserError

CLIP = 0.05  # below the gradient norm of both blocks
FREE = 1e6
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "defaults written out": {
        "lr_ratio_quarantine": 1.0,
        "betas_deployed": [0.9, 0.999],
        "weight_decay_quarantine": 0.1,
        "mean_over": "batch",
    },
    "own rates and moments": {"lr_ratio_quarantine": 3.0, "betas_quarantine": [0.5, 0.9], "weight_decay_deployed": 0.4},
    "towards the start": {"decay_to_start": True, "weight_decay_quarantine": 2.0},
    "jointly": {"clip_jointly": True},
    "own tokens": {"mean_over": "own_tokens"},
    "own rollouts": {"mean_over": "own_rollouts"},
}


@scenario(1, 2)
def optim(world: World) -> dict[str, Any]:
    """States before, between and after two steps, and their metrics."""
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        limit = CLIP if name in ("defaults", "defaults written out", "jointly") else FREE
        engine = world.engine(blocks={"optim": settings}, optim={"clip_grad": limit}, as_initialised="start" in name)
        states, metrics = [state(engine)], []
        for _ in range(2):
            metrics.append(world.train(engine, world.rollouts, micro=3))
            engine.lr_scheduler_step()
            states.append(state(engine))
        found[name] = {"states": states, "metrics": metrics}
    return found


@scenario(1, 2)
def optim_resumed(world: World) -> dict[str, Any]:
    """A run that decays towards its start and has two learning rates, interrupted and not; towards another start."""
    blocks = {"optim": {"decay_to_start": True, "lr_ratio_quarantine": 3.0, "betas_quarantine": (0.5, 0.9)}}
    engine, folder = world.engine(blocks=blocks, as_initialised=True), str(world.scratch / "optim")
    world.train(engine, world.rollouts, micro=3)
    engine.lr_scheduler_step()
    engine.save_checkpoint(folder, global_step=1)
    dist.barrier()
    resumed, found = world.engine(blocks=blocks, as_initialised=True), {}
    resumed.load_checkpoint(folder, del_local_after_load=False)
    for name, one in (("uninterrupted", engine), ("resumed", resumed)):
        found[name] = {"metrics": world.train(one, world.rollouts, micro=3), "state": state(one)}
    for name, other in (("seed", {**blocks, "seed": 1}), ("decay_to_start", {})):
        try:
            world.engine(blocks=other, as_initialised=True).load_checkpoint(folder, del_local_after_load=False)
            found[name] = "nothing was raised"
        except UserError as error:
            found[name] = str(error)
    return found
