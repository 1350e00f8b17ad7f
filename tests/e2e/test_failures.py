"""What goes wrong ends the run: in one line before Ray starts, or with the worker's own error soon after it dies."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import EngineKilled
from tests.e2e.processes import MAIN
from verl_grad_routing.compare.demo import demo_overrides

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

BAD = {
    "unknown preset": (["+grad_routing=persna"], "persna"),
    "misspelt group": (["+grad_rooting=persona"], "+grad_routing=<name>"),
    "unknown key": (["+grad_routing=persona", "+grad_routing.gate.rute=1"], "grad_routing.gate.rute=1: did you mean"),
    "FSDP1": (["+grad_routing=persona", "actor_rollout_ref.actor.strategy=fsdp"], "actor_rollout_ref.actor.strategy"),
    "oracle that is no control": (["+grad_routing=oracle", "grad_routing.control=false"], "grad_routing.control=true"),
}


@pytest.mark.usefixtures("cluster")  # not needed: it puts these tests into the lane that has time for them
@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_before_ray_starts(name: str, environment: Path, tmp_path: Path) -> None:
    arguments, told = BAD[name]
    given = [*arguments, *demo_overrides(environment, 1, seed=0)]
    if name == "misspelt group":
        given = [argument for argument in given if not argument.startswith("grad_routing")]
    done = subprocess.run([*MAIN, *given], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    lines = [line for line in done.stderr.splitlines() if told in line]
    assert done.returncode != 0 and lines, done.stderr[-2000:]
    assert "ray init kwargs" not in done.stdout and "Started a local Ray instance" not in done.stderr


def test_an_engine_that_dies_while_it_takes_weights_ends_the_run(engine_killed: EngineKilled) -> None:
    """The hardest moment: verl's worker would wait for ever for a dead engine's answer, and the trainer for it."""
    assert engine_killed.status != 0
    log = (engine_killed.folder / "log.txt").read_text(errors="replace")
    assert "RolloutDied: the rollout server at" in log
