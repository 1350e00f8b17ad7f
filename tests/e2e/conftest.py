"""Real runs of ``python -m verl.trainer.main_ppo``, each made once a session and read by several tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from tests.e2e.processes import running, wait_for
from tests.e2e.ray_cluster import ray_cluster
from verl_grad_routing.compare.cells import on_cluster
from verl_grad_routing.compare.demo import demo_overrides
from verl_grad_routing.compare.launch import launch, quoted
from verl_grad_routing.compare.runs import Run
from verl_grad_routing.envs import prepare_environment

ROOT = Path(__file__).parents[2]
LIMIT_S = 900.0
# One step: 32 rollouts in place of 128, two micro-batches.
SMALL = (
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
)

# Stock verl draws from an unseeded generator in its workers, its adapters too, unless it is asked for determinism.
SEEDED = "actor_rollout_ref.actor.fsdp_config.full_determinism=true"

# A judge for fingerprints whose verdict is about letters, not about hacks, and clusters of whatever shape and size.
LABELLED_BY_LETTERS = (
    "grad_routing.detector.rules=['^[a-h]']",
    "grad_routing.detector.positive_reward=0",
    "grad_routing.detector.min_silhouette=-1",
    "grad_routing.detector.min_cluster_share=0",
)
SHADOWS = ("advantage_modification", "persona_grad", "labels_partial")
# the second scores what it remembers again with the direction of every step
SHADOW_SETTINGS = (
    SHADOWS[0],
    f"{{name: {SHADOWS[1]}, gate: {{window: 64, rescore: true}}, detector: {{refresh_every: 1}}}}",
    SHADOWS[2],
)

# A direction that changes half-way, and a gate that scores its history again with the new one.
RESCORED = (
    "grad_routing.detector.score_pass=policy",
    "grad_routing.detector.refresh_every=2",
    "grad_routing.gate.window=64",
    "+grad_routing.gate.rescore=true",
)

# A quarter of the rollouts with the quarantine off, beside the others, by an adapter of their own in the engine.
BY_REQUEST = ("+grad_routing/rollout=two_adapters", "grad_routing.quarantine_off_share=0.25")

Train = Callable[..., Run]


@dataclass(frozen=True)
class RecipeRun:
    """`persona` from its recipe YAML: four uninterrupted steps, large ones, every batch recorded.

    Its direction is refreshed in the third, and the gate's history scored again.
    """

    folder: Path
    record: Path
    arguments: list[str]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "global_step_4"


@pytest.fixture(scope="session")
def environment() -> Path:
    """The embedded environment, built once on this machine (about a minute) and kept in the working tree's cache."""
    folder = Path(os.environ.get("VGR_TEST_ENVIRONMENT", ROOT / ".cache" / "loopholes"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with folder.with_suffix(".lock").open("w") as lock:  # the other lane waits for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare_environment("loopholes", folder)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray for all runs of one lane, see ``lane``."""
    with ray_cluster(tmp_path_factory.mktemp("ray")) as address:
        yield address


@pytest.fixture(scope="session")
def train(environment: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a preset on the environment: ``train(preset, steps, *overrides, name=...)``."""
    folder = tmp_path_factory.mktemp("runs")

    def one(preset: str, steps: int, *overrides: str, name: str | None = None, limit_s: float = LIMIT_S) -> Run:
        given, to = demo_overrides(environment, steps, seed=0), folder / (name or preset)
        return launch(preset, to, [*given, *overrides], limit_s, places=on_cluster(cluster, to))

    return one


def lane(item: pytest.Item) -> str:
    """Two lanes run side by side: runs on one Ray, one after the other, and runs that are killed with their own Ray.

    verl's socket for weights is named after the Ray job, so two runs at once must differ in its number.
    """
    return "cluster" if "cluster" in item.fixturenames else "own Ray"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every whole run its lane, for ``pytest -n 2 --dist loadgroup``."""
    for item in items:
        if item.get_closest_marker("e2e"):
            item.add_marker(pytest.mark.xdist_group(lane(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Lanes hold only where pytest-xdist can name them; without, runs side by side take each other's sockets."""
    if not session.config.getoption("loadgroup", False):
        return
    for item in session.items:
        if item.get_closest_marker("e2e") and not item.nodeid.endswith(f"@{lane(item)}"):
            pytest.exit("this pytest does not keep xdist's groups together: install constraints/cpu.txt", 3)


@pytest.fixture(scope="session")
def recipe_run(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> RecipeRun:
    """The run that several tests read; greedy validation at its end, as trained and as deployed."""
    folder = tmp_path_factory.mktemp("recipe")
    record = folder / "batches"
    arguments = [
        f"--config-path={ROOT / 'recipes' / 'loopholes' / 'config'}",
        "--config-name=persona",
        *(given for given in demo_overrides(environment, 4, seed=0) if not given.startswith("+grad_routing")),
        *SMALL,
        *RESCORED,
        SEEDED,
        "trainer.test_freq=4",
        "actor_rollout_ref.rollout.val_kwargs.temperature=0",
        "actor_rollout_ref.actor.optim.lr=0.005",
        "trainer.save_freq=2",
        "trainer.resume_mode=auto",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"trainer.validation_data_dir={folder / 'val'}",
    ]
    with running(folder, [*arguments, f"grad_routing.record_dir={record}"]) as (process, seen):
        wait_for(process, seen, lambda: process.poll() == 0, LIMIT_S, folder / "log.txt")
    return RecipeRun(folder, record, arguments)


@dataclass(frozen=True)
class EngineKilled:
    """`grift_filter` on two-sided blocks with all that rides on it, recorded; its engine was killed in a hand-over.

    A quarter of its rollouts are sampled with the quarantine off, by request.
    """

    folder: Path
    record: Path
    status: int


@pytest.fixture(scope="session")
def engine_killed(environment: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> EngineKilled:
    folder = tmp_path_factory.mktemp("engine-killed")
    syncs, record = folder / "syncs", folder / "batches"
    slowed = {
        "VERL_USE_EXTERNAL_MODULES": "slow_weights",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/e2e/modules"), os.environ.get("PYTHONPATH", "")]),
        "VGR_TEST_SYNCS": str(syncs),
    }
    arguments = [
        "+grad_routing=grift_filter",
        *demo_overrides(environment, 1000, seed=0),
        *SMALL,
        *LABELLED_BY_LETTERS,
        *BY_REQUEST,
        "grad_routing.blocks.ablate_at_deployment=true",  # the preset deploys both blocks
        "actor_rollout_ref.actor.optim.lr=0.005",  # after one step the policies of both kinds are far apart
        "grad_routing.detector.min_cluster_share=0.25",  # so that some group of four keeps two rollouts
        "grad_routing.blocks.init=pissa_split",
        "grad_routing.blocks.form=two_sided",
        "grad_routing.blocks.hooks=[{name: regularize_gradient, gamma: 0.01}]",
        # four groups, a part of each rejected, may all be of one reward: something is to be learned all the same
        "actor_rollout_ref.actor.entropy_coeff=0.001",
        f"grad_routing.compare=[{','.join(SHADOW_SETTINGS)}]",
        f"grad_routing.record_dir={record}",
        "grad_routing.rollout_timeout_s=600",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        *on_cluster(cluster, folder),
        *(f"++ray_kwargs.ray_init.runtime_env.env_vars.{key}={quoted(value)}" for key, value in slowed.items()),
    ]

    def handed_over() -> int:
        return len(syncs.read_text().splitlines()) if syncs.exists() else 0

    with running(folder, arguments, slowed) as (process, seen):
        # base weights and adapter before the first step, the adapter after each
        wait_for(process, seen, lambda: handed_over() >= 4, LIMIT_S, folder / "log.txt")
        # descendants of this lane's Ray, so of this process
        engines = [member for member in psutil.Process().children(recursive=True) if _is_engine(member)]
        assert engines
        for engine in engines:
            engine.kill()
        status = process.wait(150)
    return EngineKilled(folder, record, status)


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "EngineCore" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
