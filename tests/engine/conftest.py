"""Worlds of one and two processes, each started once and asked for everything; and the reference's inputs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.engine.reference import Reference
from tests.engine.rollouts import RANKS, Inputs, Rollout, draw_adapters, draw_rollouts, write_model

LIMIT_S = 500


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a test session that runs in parallel."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engine"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, made by whichever worker asks first and read from ``folder`` by the others."""
    file = folder / f"{name}.pt"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            torch.save(make(), partial := file.with_suffix(".partial"))
            os.replace(partial, file)
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="session")
def inputs(shared: Path) -> Inputs:
    return once(shared, "inputs", lambda: _draw_inputs(shared / "model"))


def _draw_inputs(folder: Path) -> Inputs:
    from transformers import LlamaForCausalLM

    model_dir = write_model(folder)
    model = LlamaForCausalLM.from_pretrained(model_dir)
    adapters = {name: draw_adapters(model, ranks, seed) for seed, (name, ranks) in enumerate(RANKS.items(), start=1)}
    own = Reference(model_dir, adapters["equal"])

    def log_probs(prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        return own.log_probs(Rollout(prompt, response, response, response, response, response, 0)).detach()

    return Inputs(model_dir, adapters, draw_rollouts(log_probs))


@pytest.fixture(scope="session")
def reference(inputs: Inputs) -> Callable[[str], Reference]:
    """The reference with the adapters of these ranks; loads others when told (``.load``)."""
    made = Reference(inputs.model_dir, inputs.adapters["equal"])
    return lambda ranks="equal": made.load(inputs.adapters[ranks])


class Results:
    """What a world's rank 0 found, by scenario."""

    def __init__(self, size: int, found: dict[str, Any] | str):
        self.size, self._found = size, found

    def __getitem__(self, scenario: str) -> Any:
        result = self._found if isinstance(self._found, str) else self._found[scenario]
        if isinstance(result, str):  # a traceback
            pytest.fail(f"{scenario} in a world of {self.size}:\n{result}")
        return result


def _run_world(size: int, inputs: Inputs, folder: Path) -> Results:
    torch.save(inputs, folder / "inputs.pt")
    root = Path(__file__).resolve().parents[2]
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "VERL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    logs = [folder / f"rank{rank}.log" for rank in range(size)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(Path(__file__).with_name("run_world.py")), str(rank), str(size), str(folder)]
        with log.open("w") as out:
            environment = os.environ | settings | {"PYTHONPATH": paths}
            processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=root))
    try:
        end = time.monotonic() + LIMIT_S
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                break  # one has failed; the others would wait for it
            time.sleep(0.1)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    if any(codes) or None in codes:
        tails = "\n".join(f"--- rank {i}\n{log.read_text()[-3000:]}" for i, log in enumerate(logs))
        told = f"its ranks ended with {codes} (None: alive when it was stopped, after at most {LIMIT_S} s; -9: killed)"
        return Results(size, f"{told}\n{tails}")
    return Results(size, torch.load(folder / "results.pt", weights_only=False))


@pytest.fixture(scope="session")
def worlds(inputs: Inputs, shared: Path) -> Callable[[int], Results]:
    """Results by world size; a world runs when it is first asked for."""
    done: dict[int, Results] = {}

    def run(size: int) -> Results:
        (folder := shared / f"world{size}").mkdir()
        return _run_world(size, inputs, folder)

    def ask(size: int) -> Results:
        if size not in done:
            done[size] = once(shared, f"results{size}", lambda: run(size))
        return done[size]

    return ask


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def world(request: pytest.FixtureRequest, worlds: Callable[[int], Results]) -> Results:
    return worlds(request.param)
