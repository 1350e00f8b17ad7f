"""Blocks of other forms than plain LoRA: gradients, starts, steps, what leaves the engine, and what comes back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.engine.rollouts import ADAPTERS, ALPHA, KEEP, RANKS, RICH, ROUTE, Inputs, routed
from tests.engine.scenarios_export import EXPORTS
from tests.engine.world import World, full, parameters, scenario, state
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import get_form

FORMS = ("two_sided", "antipasto", "antipasto_lineage")
# name: options of the engine, of the batch, loss is rich, tolerance
VARIANTS: dict[str, tuple[dict, dict, bool, float]] = {
    "packed": ({}, {"micro": 3}, False, 1e-5),
    "padded": ({}, {"micro": 2, "packed": False}, True, 1e-5),
    "dynamic": ({}, {"max_tokens": 30}, True, 1e-5),
    "checkpointed": ({"checkpointing": True}, {"micro": 3}, False, 1e-5),
    "unequal ranks": ({"ranks": "unequal"}, {"micro": 3}, False, 1e-5),
    "bf16": ({"dtype": "bf16"}, {"micro": 3}, False, 0.1),
}

# Variants whose old log-probs are the current ones: where PPO's clipping begins, log-probs that are rounded differently
# decide over a token's whole gradient, and what is compared is no longer rounding.
ON_POLICY = frozenset({"bf16"})


def drawn_parts(inputs: Inputs, form: str, ranks: str) -> dict[str, torch.Tensor]:
    """Values for every part of every adapted layer: the basis of order one, what trains a tenth of it."""
    generator, values = torch.Generator().manual_seed(13), {}
    for name, plain in inputs.adapters[ranks].items():
        module, found, _ = name.partition(".lora_A.default.")
        if not found:
            continue
        d_in, d_out = plain.shape[1], len(inputs.adapters[ranks][name.replace("A.default", "B.default")])
        for (block, adapter), rank in zip(ADAPTERS.items(), RANKS[ranks], strict=True):
            shapes = {"A": (rank, d_in), "B": (d_out, rank)}
            shapes |= get_form(form).extra_shapes(block, rank, d_in, d_out)
            for part, shape in shapes.items():
                scale = 0.1 if part in get_form(form).trained else shape[-1] ** -0.5
                scale = 0.3 if part in ("gain", "turn") else scale
                drawn = torch.randn(shape, generator=generator) * scale
                values[f"{module}.lora_{part}.{adapter}.weight"] = drawn
    return values


def blocks_of(form: str) -> dict[str, Any]:
    return {"form": form, "init": "pissa_split"}


def engine_of(world: World, form: str, ranks: str = "equal", blocks: dict | None = None, **options: Any) -> Any:
    values = drawn_parts(world.inputs, form, ranks)
    return world.engine(ranks, blocks={**blocks_of(form), **(blocks or {})}, adapters=values, **options)


@scenario(1, 2)
def form_gradients(world: World) -> dict[str, Any]:
    """Of the mixed batch, fed in many ways; and after a pass with the adapters off, as the reference policy's is."""
    found: dict[str, Any] = {}
    for form in FORMS:
        for name, (options, feed, rich, _) in VARIANTS.items():
            engine = engine_of(world, form, **options)
            loss, rollouts = {"loss": RICH} if rich else {}, world.rollouts
            if name in ON_POLICY:
                current = world.infer(engine_of(world, form), rollouts)["log_probs"]
                rollouts = [replace(row, old_log_probs=own) for row, own in zip(rollouts, current, strict=True)]
            found[f"{form} {name}"] = world.gradients(engine, rollouts, **loss, **feed)
        with engine.disable_adapter():
            world.infer(engine, world.rollouts, table=None)
        found[f"{form} trains"] = list(world.gradients(engine, world.rollouts, micro=3))
    return found


@scenario(1, 2)
def form_starts(world: World) -> dict[str, Any]:
    """A fresh engine as it is, ablated, and after a step; and the log-probs of the base model."""
    found: dict[str, Any] = {}
    for form in FORMS:
        for ranks in RANKS:
            engine = world.engine(ranks, blocks=blocks_of(form), as_initialised=True)
            before = parameters(engine)
            own, ablated = (
                world.infer(engine, world.rollouts, table=None, ablate_quarantine=off)["log_probs"]
                for off in (False, True)
            )
            with engine.disable_adapter():
                base = world.infer(engine, world.rollouts, table=None)["log_probs"]
            metrics = world.train(engine, world.rollouts, micro=3)
            found[f"{form} {ranks}"] = {
                "before": before,
                "log_probs": {"as it is": own, "ablated": ablated, "base": base},
                "after": parameters(engine),
                "metrics": metrics,
            }
    return found


@scenario(1, 2)
def form_steps(world: World) -> dict[str, Any]:
    """States around batches that train one block alone, after steps that gave Adam momentum, with weight decay."""
    found = {}
    for form in FORMS:
        engine = engine_of(world, form)
        for _ in range(2):
            world.train(engine, world.rollouts, micro=3)
        states = [state(engine)]
        for route in (ROUTE, KEEP):
            world.train(engine, routed(world.rollouts, route), micro=3)
            states.append(state(engine))
        found[form] = states
    return found


@scenario(1, 2)
def form_exports(world: World) -> dict[str, Any]:
    """What the rollout gets, as an adapter and merged, and the engine's own log-probs."""
    found: dict[str, Any] = {}
    for form in FORMS:
        engine = engine_of(world, form, "unequal")
        for name, blocks in EXPORTS.items():
            engine.exported_blocks = blocks
            tensors, config = engine.get_per_tensor_param(base_sync_done=True)
            found[f"{form} {name}"] = {"tensors": dict(tensors), "config": config}
        for name, off in (("joined", False), ("deployed", True)):
            log_probs = world.infer(engine, world.rollouts, table=None, ablate_quarantine=off)["log_probs"]
            found[f"{form} {name}"]["log_probs"] = log_probs
        tensors, _ = engine.get_per_tensor_param(base_sync_done=False)
        found[f"{form} base"] = {name: full(tensor) for name, tensor in tensors}
        engine = engine_of(world, form, "unequal", merge=True)
        for name, blocks in EXPORTS.items():
            engine.exported_blocks = blocks
            tensors, _ = engine.get_per_tensor_param(base_sync_done=True)
            found[f"{form} merged {name}"] = {key: tensor.clone() for key, tensor in tensors}
    return found


@scenario(1, 2)
def form_checkpoints(world: World) -> dict[str, Any]:
    """A run that is saved and goes on, and one that starts from another basis and resumes; another form is refused."""
    found: dict[str, Any] = {}
    for form in FORMS:
        folder = str(world.scratch / f"form_{form}")
        settings = {"form": form, "init": "random_orthogonal"}
        engine = world.engine(blocks={**settings, "seed": 1}, as_initialised=True)
        world.train(engine, world.rollouts, micro=3)
        engine.save_checkpoint(folder, global_step=1)
        saved = state(engine)
        resumed = world.engine(blocks={**settings, "seed": 2}, as_initialised=True)
        other = parameters(resumed)
        resumed.load_checkpoint(folder, del_local_after_load=False)
        for one in (engine, resumed):
            world.train(one, world.rollouts, micro=3)
        found[form] = {"saved": saved, "other": other, "uninterrupted": state(engine), "resumed": state(resumed)}
        found[form]["told"] = _told(world.engine(), folder, ALPHA // get_form(form).sides)
    return found


def _told(engine: Any, folder: str, alpha: int) -> str:
    """What plain blocks of the checkpoint's scaling say to it."""
    object.__setattr__(engine.model_config, "lora_alpha", alpha)
    try:
        engine.load_checkpoint(folder, del_local_after_load=False)
    except UserError as error:
        return str(error)
    return "nothing was raised"
