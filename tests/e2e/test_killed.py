"""Runs that are killed: after kill -9 the same weights bit for bit, after Ctrl-C nothing left behind."""

from __future__ import annotations

import os
import signal

import pytest

from tests.e2e.checkpoints import ACTOR, EXTRA, MODEL, OPTIMIZER, assert_moved, assert_same, saved
from tests.e2e.conftest import LIMIT_S, SMALL, RecipeRun
from tests.e2e.processes import family, running, steps_done, still_alive, wait_for
from verl_grad_routing.compare.demo import demo_overrides
from verl_grad_routing.compare.runs import load_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

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
