"""Methods switched off and on, on the same batches: the trainer's own driver code, then steps of a real engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.engine.dense_reference import SETTINGS as DENSE
from tests.engine.off_switches import NARROW, SWITCHES, WHOLE, Switch, settings
from tests.engine.rollouts import RICH, Rollout
from tests.engine.scenarios_methods import directions
from tests.engine.world import World, fill, parameters, scenario, state
from tests.modules.driver import GROUP, trainer
from tests.modules.memory_queue import Queue
from verl_grad_routing.config import parse
from verl_grad_routing.subspaces import save_basis

VANILLA = {False: Switch("vanilla_2r"), True: Switch("vanilla_2r", dense=True)}


def recorded(queue: Queue, rollouts: list[Rollout], step: int) -> Any:
    """The batch of a step: groups of four, rewards of 0 and 1, hacks among what is paid."""
    from transfer_queue import KVBatchMeta

    generator = torch.Generator().manual_seed(step)
    keys = [f"u{index // GROUP}_{index % GROUP}_0" for index in range(len(rollouts))]
    for index, (key, row) in enumerate(zip(keys, rollouts, strict=True)):
        paid = float(torch.rand((), generator=generator) < 0.6)
        rewards = torch.zeros(len(row.response))
        rewards[-1] = paid
        facts = {"hack": paid * (index % 2), "solve": paid * (1 - index % 2), "known": 1.0, "loophole": "leak"}
        queue.rows[key] = {
            "uid": key.split("_")[0],
            "index": int(key.split("_")[0][1:]),
            "prompts": row.prompt,
            "responses": row.response,
            "response_mask": row.mask,
            "loss_mask": row.mask,
            "rm_scores": rewards,
            "old_log_probs": row.old_log_probs,
            "rollout_log_probs": row.old_log_probs,
            "ref_log_prob": row.ref_log_probs,
            "extra_fields": {"reward_extra_info": facts},
        }
    return KVBatchMeta(keys, [{} for _ in keys], "train", sorted(queue.rows[keys[0]]), {})


def taught(made: Any, rollouts: list[Rollout], step: int) -> tuple[list[Rollout], dict[str, Any]]:
    """The rows that the step trains on, and the settings of its batch."""
    from verl_grad_routing.training.masks import TABLE
    from verl_grad_routing.training.own_gate import CURRENT

    queue, made.global_steps = Queue(), step
    with mock.patch.multiple("transfer_queue", **queue.calls):
        batch = recorded(queue, rollouts, step)
        assert made._after_sample(batch) is batch
        batch = made._compute_advantage(batch, {})
        asked = {"table": made._tables()[TABLE], CURRENT: made._is_one_on_policy_update(len(batch.keys))}
    rows = []
    for key, row in zip(batch.keys, rollouts, strict=True):
        found = queue.rows[key]
        assert torch.equal(found["response_mask"], found["loss_mask"])
        route = int(found["route"])
        rows.append(dataclasses.replace(row, advantages=found["advantages"], mask=found["loss_mask"], route=route))
    return rows, asked


def as_started(world: World, engine: Any) -> Any:
    """The engine without hooks, adapters and optimizer as they were: most methods need no other, so there is one."""
    fill(engine, world.inputs.adapters["equal"])
    engine.optimizer.state.clear()
    return engine


def trained(world: World, plain: Any, switch: Switch, on: bool) -> Mapping[str, Tensor]:
    """Weights and optimizer state after two recorded batches."""
    config = parse(settings(switch, on))
    hooks = [dict(hook) for hook in config.blocks.hooks]
    for hook in hooks:
        if hook.get("basis") in (NARROW, WHOLE):
            hook["basis"] = str(world.scratch / f"off-{hook['basis']}.safetensors")
    blocks = {**(DENSE if switch.dense else {}), "hooks": hooks}
    engine = world.engine(blocks=blocks) if hooks or switch.dense else as_started(world, plain)
    made = trainer(config)
    for step, rollouts in ((1, world.rollouts), (2, world.rollouts[::-1])):
        rows, asked = taught(made, rollouts, step)
        world.train(engine, rows, RICH, micro=4, **asked)
    return parameters(engine) if switch.dense else state(engine)


@scenario(1)
def off_switches(world: World) -> dict[str, dict[str, list[str]]]:
    """By method: what differs from vanilla with the method off, and with it on."""
    for name in (NARROW, WHOLE):
        made = directions(world.inputs.adapters["equal"], identity=name == WHOLE)
        save_basis(made, world.scratch / f"off-{name}.safetensors")
    plain = world.engine()
    vanilla = {dense: trained(world, plain, switch, on=True) for dense, switch in VANILLA.items()}

    def different(switch: Switch, on: bool) -> list[str]:
        found, ours = trained(world, plain, switch, on), vanilla[switch.dense]
        same = {key for key in ours.keys() & found.keys() if torch.equal(ours[key], found[key])}
        return sorted({*ours, *found} - same)

    return {
        name: {"off": different(switch, False), "on": different(switch, True) if switch.acts else []}
        for name, switch in SWITCHES.items()
    }
