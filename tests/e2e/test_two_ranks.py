"""Two ranks with all that can ride on a routed run: confessions beside answers, updates kept in few directions, an L1
term on the quarantine, a head start that ends, and blocks that read what pairs differ in.

Ended by Ctrl-C, of which nothing is left; ``test_compare`` has kill -9.
"""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from tests.e2e.conftest import LIMIT_S, SMALL
from tests.e2e.processes import running, steps_done, still_alive, wait_for
from verl_grad_routing.commands.contrast import make_contrast
from verl_grad_routing.compare.cells import on_cluster
from verl_grad_routing.compare.demo import demo_overrides
from verl_grad_routing.compare.runs import Run, load_run
from verl_grad_routing.routing import save_contrast
from verl_grad_routing.subspaces import Basis, save_basis
from verl_grad_routing.subspaces.change import leading

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

LEARNING_RATE = 0.01
CONFESSIONS = [
    "grad_routing.confessions.share=0.5",
    *(
        f"grad_routing.confessions.{key}=${{grad_routing.environment.confession_{name}}}"
        for key, name in (("format", "format"), ("judge", "judge"), ("max_tokens", "tokens"))
    ),
]


def main_directions(model: Path, rank: int) -> Basis:
    """Of every linear module: where its own weights send most. A basis that no warm-up has to make first."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    linear = {name: module for name, module in loaded.model.named_modules() if isinstance(module, torch.nn.Linear)}
    return Basis({f"model.{name}": leading(module.weight.detach(), rank) for name, module in linear.items()})


def descendants() -> dict[int, psutil.Process]:
    """Of this process: runs, and the lane's Ray with all its actors."""
    return {member.pid: member for member in psutil.Process().children(recursive=True)}


def alive(processes: list[psutil.Process], patience_s: float) -> list[str]:
    """Names of those that do not end within ``patience_s``; workers that Ray keeps for the next run are none."""
    names = {}
    for process in still_alive(processes, 0):
        try:
            names[process.pid] = " ".join(process.cmdline()) or process.name()
        except psutil.NoSuchProcess:
            continue
    waiting = [process for process in processes if process.pid in names and "ray::IDLE" not in names[process.pid]]
    left = [process for process in still_alive(waiting, patience_s) if process.status() != psutil.STATUS_ZOMBIE]
    return [names[process.pid] for process in left]


@pytest.fixture(scope="module")
def two_ranks(environment: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("two-ranks")
    basis = folder / "basis.safetensors"
    save_basis(main_directions(environment / "model", rank=5), basis)
    contrast = folder / "contrast.safetensors"
    save_contrast(make_contrast(environment / "model", str(environment / "pairs.jsonl")), contrast)
    arguments = [
        "+grad_routing=persona",
        *demo_overrides(environment, 1000, seed=0),
        *SMALL,
        *CONFESSIONS,
        f"grad_routing.blocks.hooks=[{{name: project_update, basis: '{basis}', rank: 5}},"
        "{name: l1_activations, weight: 0.001}]",
        "+grad_routing.intervention.head_start_steps=2",
        "grad_routing.blocks.init=corda",
        f"grad_routing.blocks.contrast={contrast}",
        "grad_routing.hardware.ranks=2",
        f"actor_rollout_ref.actor.optim.lr={LEARNING_RATE}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        *on_cluster(cluster, folder),
    ]
    before = descendants()
    with running(folder, arguments) as (process, seen):
        wait_for(process, seen, lambda: steps_done(folder) >= 4, LIMIT_S, folder / "log.txt")
        own = [member for pid, member in descendants().items() if pid not in before]
        assert sum("WorkerDict" in " ".join(member.cmdline()) for member in own) == 2
        os.kill(process.pid, signal.SIGINT)
        process.wait(90)
        left = alive(own, 60)
    assert not left, left
    return load_run(folder)


def finite(run: Run, key: str) -> list[float]:
    """Of steps that have it: one in sixteen draws no prompt for confessions."""
    values = run.curve(key).values.tolist()[:4]
    assert values and all(math.isfinite(value) for value in values), (key, values)
    return values


def test_two_ranks_reach_vllm(two_ranks: Run) -> None:
    shares = [finite(two_ranks, f"routing/share_{route}") for route in ("keep", "absorb", "route")]
    assert all(sum(step) == pytest.approx(1) for step in zip(*shares, strict=True)) and max(shares[2]) > 0
    # the weights moved a lot (the deployed block not in a step that routes everything)
    moved = [finite(two_ranks, f"routing/update_norm/{block}")[:3] for block in ("deployed", "quarantine")]
    assert min(map(sum, zip(*moved, strict=True))) > 10 * LEARNING_RATE and max(moved[0]) > 10 * LEARNING_RATE
    # and vLLM sampled from the weights that the trainer holds, at every step
    assert max(finite(two_ranks, "training/rollout_probs_diff_max")) < 1e-3


def test_blocks_from_pairs_on_two_ranks(two_ranks: Run) -> None:
    """Either block reads directions in which the pairs differ; what vLLM samples from has them, see above."""
    assert "blocks: init corda, " in (two_ranks.folder / "log.txt").read_text(errors="replace")


def test_confessions_are_trained_beside_routed_answers(two_ranks: Run) -> None:
    for key in ("reward_mean", "rate", "unparsable", "accuracy"):
        assert all(0 <= value <= 1 for value in finite(two_ranks, f"confession/{key}")), key
    assert sum(finite(two_ranks, "confession/count")) > 0
    assert all(math.isfinite(value) for value in finite(two_ranks, "confession/pg_loss"))


def test_updates_are_projected(two_ranks: Run) -> None:
    assert all(0 < share < 1 for share in finite(two_ranks, "routing/project_update/share_inside"))


def test_the_quarantines_activations_are_measured_and_a_head_start_ends(two_ranks: Run) -> None:
    assert min(finite(two_ranks, "routing/l1_activations/per_token")) > 0
    assert finite(two_ranks, "intervention/head_start") == [1, 1, 0, 0]


@pytest.mark.slow
def test_ctrl_c_ends_a_ray_of_the_runs_own(environment: Path, tmp_path: Path) -> None:
    arguments = ["+grad_routing=persona", *demo_overrides(environment, 1000, seed=0), *SMALL]
    with running(tmp_path, arguments) as (process, seen):
        wait_for(process, seen, lambda: steps_done(tmp_path) >= 1, LIMIT_S, tmp_path / "log.txt")
        os.kill(process.pid, signal.SIGINT)
        process.wait(90)
        assert not [p for p in still_alive(list(seen.values()), 60) if p.status() != psutil.STATUS_ZOMBIE]
