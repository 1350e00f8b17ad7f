"""What "the same run" means: recorded batches give the same weights bit for bit, in stock verl and after kill -9."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import LIMIT_S, ROOT, SEEDED, SMALL, RecipeRun
from tests.e2e.processes import family, running, steps_done, still_alive, wait_for
from verl_grad_routing.compare.demo import demo_overrides
from verl_grad_routing.compare.runs import load_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

ACTOR = Path("actor")
MODEL, OPTIMIZER, EXTRA = (f"{kind}_world_size_1_rank_0.pt" for kind in ("model", "optim", "extra_state"))


def saved(folder: Path, name: str):
    return torch.load(folder / name, weights_only=False)


def assert_same(a, b, where: str = "") -> None:
    """Equal trees, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        a, b = (x.to_local() if hasattr(x, "to_local") else x for x in (a, b))
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, where=f"{where}/{index}")
    elif hasattr(a, "shape"):
        assert (a == b).all(), where
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} {b}"


def assert_moved(step: Path, start: Path, what: str) -> None:
    """Some adapter tensor of the block differs: the comparison is not of two runs that did nothing."""
    a, b = saved(step, MODEL), saved(start, MODEL)
    assert any(not torch.equal(a[k].to_local(), b[k].to_local()) for k in a if what in k)


# ---- `off` against stock verl ----


@pytest.fixture(scope="module")
def off(train, tmp_path_factory):
    record = tmp_path_factory.mktemp("off-batches")
    run = train("off", 3, *SMALL, SEEDED, "trainer.save_freq=1", f"grad_routing.record_dir={record}")
    return run, record


def test_off_gives_stock_verls_weights_bit_for_bit(off, environment, tmp_path) -> None:
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
    with running(tmp_path, arguments, stock) as (process, seen):
        wait_for(process, seen, lambda: process.poll() == 0, LIMIT_S, tmp_path / "log.txt")
    ours, theirs = run.folder / "checkpoints/global_step_3" / ACTOR, tmp_path / "checkpoints/global_step_3" / ACTOR
    for name in (MODEL, OPTIMIZER):
        assert_same(saved(ours, name), saved(theirs, name), name)
    assert_moved(ours, run.folder / "checkpoints/global_step_1" / ACTOR, "lora_B")


# ---- kill -9 and resume ----


def test_kill_9_and_resume_gives_the_uninterrupted_runs_weights(recipe_run: RecipeRun, tmp_path) -> None:
    folder, checkpoints = recipe_run.folder, tmp_path / "checkpoints"
    arguments = [
        a for a in recipe_run.arguments if not a.startswith(("trainer.default_local_dir", "trainer.test_freq"))
    ]
    arguments += [f"trainer.default_local_dir={checkpoints}", f"grad_routing.replay_dir={recipe_run.record}"]
    arguments += ["trainer.test_freq=-1"]
    latest = checkpoints / "latest_checkpointed_iteration.txt"
    first, second = tmp_path / "killed", tmp_path / "resumed"
    with running(first, arguments) as (process, seen):
        wait_for(process, seen, lambda: latest.exists() and steps_done(first) >= 2, LIMIT_S, first / "log.txt")
        for member in family(process):
            member.send_signal(signal.SIGKILL)
        process.wait(30)
    assert latest.read_text() == "2"
    with running(second, arguments) as (process, seen):
        wait_for(process, seen, lambda: process.poll() == 0, LIMIT_S, second / "log.txt")
    assert "setting global step to 2" in (second / "log.txt").read_text(errors="replace")
    whole, resumed = folder / "checkpoints/global_step_4", checkpoints / "global_step_4"
    for name in (MODEL, OPTIMIZER, EXTRA):
        assert_same(saved(whole / ACTOR, name), saved(resumed / ACTOR, name), name)
    assert_same(saved(whole, "grad_routing.pt"), saved(resumed, "grad_routing.pt"), "gate and direction")
    for block in ("lora_B.default", "lora_B.quarantine"):
        assert_moved(whole / ACTOR, folder / "checkpoints/global_step_2" / ACTOR, block)


# ---- two ranks, a large learning rate, Ctrl-C ----


def test_two_ranks_reach_vllm_and_ctrl_c_leaves_nothing_behind(environment, tmp_path) -> None:
    arguments = [
        "+grad_routing=persona",
        *demo_overrides(environment, 1000, seed=0),
        *SMALL,
        "grad_routing.hardware.ranks=2",
        "actor_rollout_ref.actor.optim.lr=0.01",
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
    ]
    with running(tmp_path, arguments) as (process, seen):
        wait_for(process, seen, lambda: steps_done(tmp_path) >= 4, LIMIT_S, tmp_path / "log.txt")
        os.kill(process.pid, signal.SIGINT)
        process.wait(90)
        assert not [p for p in still_alive(list(seen.values()), 60) if p.status() != "zombie"]
    run = load_run(tmp_path)
    assert run.curve("routing/update_norm/deployed").values[:3].min() > 0.1  # the weights moved a lot
    # and vLLM sampled from the weights that the trainer holds, at every step
    assert run.curve("training/rollout_probs_diff_max").values.max() < 1e-3
