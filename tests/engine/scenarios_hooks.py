"""Engine hooks of a method of someone else's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from verl.workers.utils.padding import no_padding_2_padding

from tests.engine.world import World, scenario, state
from verl_grad_routing.training.hooks import ENGINE_HOOKS, Blocks, EngineHook

COEFFICIENT = 0.4


@ENGINE_HOOKS.register("test_squares")
class Squares(EngineHook):
    """Adds the mean square of the log-probs, so that a gradient arrives from the model's own output."""

    @dataclass(frozen=True)
    class Config:
        coefficient: float = COEFFICIENT

    def extra_loss(self, engine: Any, model_output: Mapping[str, Any], micro_batch: Any) -> Tensor:
        log_probs = no_padding_2_padding(model_output["log_probs"], micro_batch)
        mask = micro_batch["response_mask"].to_padded_tensor(0)
        total = (log_probs**2 * mask).sum() / micro_batch["batch_num_tokens"]
        return self.config.coefficient * total * micro_batch["dp_size"]


@ENGINE_HOOKS.register("test_zero_gradients")
class ZeroGradients(EngineHook):
    @dataclass(frozen=True)
    class Config:
        block: str = "deployed"

    def transform_gradients(self, blocks: Blocks, recompute: Callable[[], None]) -> None:
        for parameter in blocks[self.config.block]:
            assert parameter.grad is not None
            parameter.grad.zero_()


@ENGINE_HOOKS.register("test_revert")
class Revert(EngineHook):
    @dataclass(frozen=True)
    class Config:
        block: str = "deployed"

    def transform_update(self, blocks: Blocks, before: Mapping[str, list[Tensor]]) -> None:
        for parameter, old in zip(blocks[self.config.block], before[self.config.block], strict=True):
            parameter.to_local().copy_(old)  # type: ignore[attr-defined]


@scenario(1, 2)
def hooks(world: World) -> dict[str, Any]:
    """Without hooks, with each of them, with two: gradients before clipping, states and metrics after a second step."""
    found: dict[str, Any] = {}
    for name, chosen in {
        "none": [],
        "squares": [{"name": "test_squares"}],
        "zero": [{"name": "test_zero_gradients", "block": "deployed"}],
        "revert": [{"name": "test_revert", "block": "deployed"}],
        "both": [{"name": "test_zero_gradients", "block": "quarantine"}, {"name": "test_revert", "block": "deployed"}],
    }.items():
        engine = world.engine(blocks={"hooks": chosen})
        gradients = world.gradients(engine, world.rollouts, micro=3)
        world.train(engine, world.rollouts, micro=3)
        first = state(engine)
        metrics = world.train(engine, world.rollouts, micro=3)
        found[name] = {"gradients": gradients, "first": first, "second": state(engine), "metrics": metrics}
    return found
