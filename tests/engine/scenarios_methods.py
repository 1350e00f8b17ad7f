"""The engine hooks that ship, in a real engine: what is clipped, what is stepped, and their off-switches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.rollouts import RICH
from tests.engine.world import World, adapters_of, full, scenario, state
from verl_grad_routing.subspaces import Basis, Subspace, save_basis
from verl_grad_routing.training.hooks import ENGINE_HOOKS, Blocks, EngineHook

RANK = 3
GAMMA, EPSILON, CLIP = 0.5, 0.05, 0.3


@ENGINE_HOOKS.register("test_capture")
class Capture(EngineHook):
    """Keeps the gradients that the hooks before it have left."""

    @dataclass(frozen=True)
    class Config:
        pass

    def bind(self, parameters: Any) -> None:
        self.parameters = dict(parameters)

    def transform_gradients(self, blocks: Blocks, recompute: Callable[[], None]) -> None:
        self.found = {name: full(p.grad) for name, p in self.parameters.items() if p.grad is not None}


def directions(adapters: dict[str, Tensor], *, identity: bool) -> Basis:
    """A basis of every adapted module, drawn from a seed; or all output directions with their own names."""
    generator = torch.Generator().manual_seed(5)
    subspaces = {}
    for name, value in adapters.items():
        module, found, _ = name.removeprefix("base_model.model.").partition(".lora_B.default.")
        if found:
            outputs = value.shape[0]
            drawn = torch.randn(outputs, RANK, generator=generator, dtype=torch.float64)
            vectors = torch.eye(outputs) if identity else torch.linalg.qr(drawn)[0].float()
            values = torch.ones(outputs) if identity else torch.tensor([4.0, 2.0, 1.0])
            subspaces[module] = Subspace(vectors, values)
    return Basis(subspaces)


@scenario(1, 2)
def methods(world: World) -> dict[str, Any]:
    """Two steps with each hook: gradients after it in the first, states after each."""
    narrow, whole = (str(world.scratch / f"{name}.safetensors") for name in ("narrow", "whole"))
    if world.rank == 0:
        for path, identity in ((narrow, False), (whole, True)):
            save_basis(directions(world.inputs.adapters["equal"], identity=identity), world.scratch / path)
    dist.barrier()
    flat = {"name": "regularize_gradient", "gamma": GAMMA, "epsilon": EPSILON, "clip": CLIP}
    project = {"name": "project_update", "basis": narrow, "rank": RANK}
    everything = {"name": "project_update", "basis": whole, "rank": None, "weights": "ones"}
    found: dict[str, Any] = {}
    for name, hook in {
        "none": None,
        "regularize": flat,
        "gamma 0": {**flat, "gamma": 0.0},
        "project": project,
        "project update": {**project, "project": "update"},
        "inputs frozen": {**project, "lora_a": "frozen"},
        "identity": everything,
        "identity update": {**everything, "project": "update"},
    }.items():
        engine = world.engine(
            blocks={"hooks": [hook, {"name": "test_capture"}] if hook else [{"name": "test_capture"}]}
        )
        metrics = world.train(engine, world.rollouts, RICH, micro=3)
        gradients, first = engine.hooks[-1].found, state(engine)
        # then a mini-batch that trains one block alone
        world.train(engine, [replace(row, route=2) for row in world.rollouts], RICH, micro=3)
        assert all(p.dtype == torch.float32 for p in adapters_of(engine).values())
        found[name] = {"gradients": gradients, "first": first, "second": state(engine), "metrics": metrics}
    return found
