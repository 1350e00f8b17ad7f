"""The smoke comparison with real runs: killed with -9 half-way, started again, reported.

Its cells also show what is promised of single runs: a killed one goes on to the same weights bit for bit, and `off` is
stock verl.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.checkpoints import ACTOR, EXTRA, MODEL, OPTIMIZER, assert_moved, assert_same, saved
from tests.e2e.conftest import LIMIT_S, RESCORED, ROOT, SEEDED, SMALL, RecipeRun
from tests.e2e.processes import family, running, steps_done, wait_for
from verl_grad_routing.compare.demo import demo_overrides
from verl_grad_routing.compare.execute import run_grid
from verl_grad_routing.compare.grid_report import write_grid_report
from verl_grad_routing.compare.launch import quoted
from verl_grad_routing.compare.runs import load_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3000)]

SMOKE = ROOT / "recipes" / "comparison" / "smoke.yaml"
CELLS = {f"loopholes.{arm}.seed-{seed}" for arm in ("off", "persona") for seed in (0, 1)}
STEPS, SAVED = 4, 2


@dataclass(frozen=True)
class Comparison:
    """The smoke recipe, killed while its second cell trained and started again; its output of the second time."""

    grid: Path
    out: Path
    first_before: tuple[bytes, int]
    told: str

    def folder(self, arm: str, seed: int = 0) -> Path:
        return self.out / "loopholes" / arm / f"seed-{seed}"


def vgr(*arguments: object, **keywords) -> subprocess.Popen:
    command = [sys.executable, "-m", "verl_grad_routing.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **keywords)


def written(path: Path) -> tuple[bytes, int]:
    return path.read_bytes(), path.stat().st_mtime_ns


@pytest.fixture(scope="module")
def comparison(environment: Path, recipe_run: RecipeRun, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The recipe with checkpoints, on the other tests' environment: `persona` on the batches of ``recipe_run``."""
    keys = yaml.load(SMOKE.read_text(), yaml.BaseLoader)  # every value as text: off stays off
    numbers = {"seeds": [int(seed) for seed in keys["seeds"]], "control": None, "limit_s": LIMIT_S}
    persona = [f"grad_routing.replay_dir={recipe_run.record}", "actor_rollout_ref.actor.optim.lr=0.005", *RESCORED]
    changes = {
        "arms": [
            {"name": "off", "overrides": ["grad_routing.record_dir='${trainer.default_local_dir}/batches'"]},
            {"name": "persona", "overrides": persona},
        ],
        "environments": [{"name": "loopholes", "dir": str(environment), "split": "test"}],
        "steps": STEPS,
        "save_every": SAVED,
        "overrides": [*keys["overrides"], SEEDED],
    }
    assert [arm["name"] for arm in changes["arms"]] == keys["arms"]
    base = tmp_path_factory.mktemp("comparison")
    grid, out = base / "smoke.yaml", base / "out"
    grid.write_text(yaml.safe_dump({**keys, **numbers, **changes}))
    cell = out / "loopholes" / "persona" / "seed-0"
    latest = cell / "checkpoints" / "latest_checkpointed_iteration.txt"
    with (base / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "verl_grad_routing.cli", "compare", str(grid), "--to", str(out)]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    seen: dict[int, psutil.Process] = {}
    try:
        reached = lambda: latest.exists() and steps_done(cell) >= SAVED  # noqa: E731
        wait_for(process, seen, reached, 2 * LIMIT_S, base / "log.txt")
    finally:
        for member in family(process):
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        process.wait(30)
    assert not psutil.wait_procs(list(seen.values()), timeout=90)[1]
    assert latest.read_text() == str(SAVED)
    before = written(out / "loopholes" / "off" / "seed-0" / "run.json")
    again = vgr("compare", grid, "--to", out)
    told, _ = again.communicate(timeout=4 * LIMIT_S)
    assert again.returncode == 0, told[-3000:]
    return Comparison(grid, out, before, told)


def test_what_was_finished_is_not_run_again(comparison: Comparison, capfd: pytest.CaptureFixture[str]) -> None:
    assert "4 cells, 1 finished before" in comparison.told
    assert written(comparison.folder("off") / "run.json") == comparison.first_before
    outcome = run_grid(comparison.grid, comparison.out)
    assert not outcome.failed and "4 cells, 4 finished before" in capfd.readouterr().err


def test_every_cell_has_its_result(comparison: Comparison) -> None:
    results = {
        path.stem: json.loads(path.read_text()) for path in (comparison.out / "results").glob("loopholes.*.json")
    }
    assert results.keys() == CELLS and {data["status"] for data in results.values()} == {"finished"}
    for name, data in results.items():
        assert data["curves"]["hack/rate"]["steps"] == [1, 2, 3, 4], name
        views = [entry["deployed"] for entry in data["validations"] if entry["step"] == STEPS]
        assert views == ([False, True] if data["arm"] == "persona" else [False]), name
        assert all(entry["overall"]["total"] == 64 for entry in data["validations"])
        assert str(comparison.out) not in json.dumps(data)


def test_the_report_is_the_same_each_time(comparison: Comparison, tmp_path: Path) -> None:
    results, tables = comparison.out / "results", []
    done = vgr("report", results, "--to", tmp_path / "a")
    told, _ = done.communicate(timeout=300)
    assert done.returncode == 0, told
    write_grid_report(results, tmp_path / "b")
    for name in ("a", "b"):
        tables.append({path.name: path.read_bytes() for path in (tmp_path / name / "tables").iterdir()})
    assert tables[0] == tables[1] and "loopholes-hack-as-deployed-paired-differences.md" in tables[0]
    assert "persona minus off" in (tmp_path / "a" / "report.html").read_text()


def test_kill_9_and_resume_gives_the_uninterrupted_runs_weights(comparison: Comparison, recipe_run: RecipeRun) -> None:
    """On the same batches; the uninterrupted run is the recipe's, so both compose the same training."""
    folder = comparison.folder("persona")
    assert f"setting global step to {SAVED}" in (folder / "log.txt").read_text(errors="replace")
    whole, resumed = recipe_run.checkpoint, folder / "checkpoints" / f"global_step_{STEPS}"
    for name in (MODEL, OPTIMIZER, EXTRA):
        assert_same(saved(whole / ACTOR, name), saved(resumed / ACTOR, name), name)
    assert_same(saved(whole, "grad_routing.pt"), saved(resumed, "grad_routing.pt"), "gate and direction")
    assert len(saved(whole, "grad_routing.pt")["detector"]["buffer"]["features_NLd"]) == 64  # the gate's window
    rescored = load_run(recipe_run.folder).curve("gate/rescored").values.tolist()
    assert rescored == [0, 0, 64, 0]  # the third step's direction is another; 32 rollouts a step
    for block in ("lora_B.default", "lora_B.quarantine"):
        assert_moved(whole / ACTOR, recipe_run.folder / "checkpoints" / f"global_step_{SAVED}" / ACTOR, block)


def test_off_gives_stock_verls_weights_bit_for_bit(comparison: Comparison, environment: Path, tmp_path: Path) -> None:
    """What "stock" means: verl itself, which has never seen us, on the batches that `off` trained on."""
    off = comparison.folder("off") / "checkpoints"
    sampler = "trainer.v1.sampler"
    arguments = [
        *demo_overrides(environment, STEPS, seed=0),
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
        f"+{sampler}.sampler_kwargs.replay_dir={off / 'batches'}",
        f"trainer.save_freq={STEPS}",
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
    ]
    arguments = [a for a in arguments if not a.startswith("grad_routing.seed") and ".blocks." not in a]
    stock = {
        "VERL_USE_EXTERNAL_MODULES": "stock_verl",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/e2e/modules"), os.environ.get("PYTHONPATH", "")]),
    }
    arguments += [f"++ray_kwargs.ray_init.runtime_env.env_vars.{key}={quoted(value)}" for key, value in stock.items()]
    with running(tmp_path, arguments, stock) as (process, seen):
        wait_for(process, seen, lambda: process.poll() == 0, LIMIT_S, tmp_path / "log.txt")
    step = f"global_step_{STEPS}"
    ours, theirs = off / step / ACTOR, tmp_path / "checkpoints" / step / ACTOR
    for name in (MODEL, OPTIMIZER):
        assert_same(saved(ours, name), saved(theirs, name), name)
    assert_moved(ours, off / f"global_step_{SAVED}" / ACTOR, "lora_B")
