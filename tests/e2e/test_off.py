"""What "stock" means: on the same batches, ``off`` gives stock verl's weights bit for bit."""

from __future__ import annotations

import os

import pytest

from tests.e2e.checkpoints import ACTOR, MODEL, OPTIMIZER, assert_moved, assert_same, saved
from tests.e2e.conftest import LIMIT_S, ROOT, SEEDED, SMALL
from tests.e2e.processes import running, wait_for
from verl_grad_routing.compare.cells import on_cluster
from verl_grad_routing.compare.demo import demo_overrides
from verl_grad_routing.compare.launch import quoted

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def off(train, tmp_path_factory):
    record = tmp_path_factory.mktemp("off-batches")
    run = train("off", 3, *SMALL, SEEDED, "trainer.save_freq=1", f"grad_routing.record_dir={record}")
    return run, record


def test_off_gives_stock_verls_weights_bit_for_bit(off, environment, cluster, tmp_path) -> None:
    run, record = off
    sampler = "trainer.v1.sampler"
    arguments = [
        *demo_overrides(environment, 3, seed=0),
        *SMALL,
        SEEDED,
        "trainer.v1.trainer_mode=stock_sync",
        "trainer.experiment_name=stock",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.ref.strategy=fsdp2",
        "actor_rollout_ref.model.lora_rank=16",
        "actor_rollout_ref.model.lora_alpha=32",
        "actor_rollout_ref.model.target_modules=all-linear",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        f"+{sampler}.custom_sampler.path=pkg://verl_grad_routing.training.replay",
        f"+{sampler}.custom_sampler.name=RoutedReplayBuffer",
        f"+{sampler}.sampler_kwargs.replay_dir={record}",
        "trainer.save_freq=3",
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
    ]
    arguments = [a for a in arguments if not a.startswith("grad_routing.seed") and ".blocks." not in a]
    stock = {
        "VERL_USE_EXTERNAL_MODULES": "stock_verl",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/e2e/modules"), os.environ.get("PYTHONPATH", "")]),
    }
    arguments += on_cluster(cluster, tmp_path)
    arguments += [f"++ray_kwargs.ray_init.runtime_env.env_vars.{key}={quoted(value)}" for key, value in stock.items()]
    with running(tmp_path, arguments, stock) as (process, seen):
        wait_for(process, seen, lambda: process.poll() == 0, LIMIT_S, tmp_path / "log.txt")
    ours, theirs = run.folder / "checkpoints/global_step_3" / ACTOR, tmp_path / "checkpoints/global_step_3" / ACTOR
    for name in (MODEL, OPTIMIZER):
        assert_same(saved(ours, name), saved(theirs, name), name)
    assert_moved(ours, run.folder / "checkpoints/global_step_1" / ACTOR, "lora_B")
