"""The smoke comparison with real runs: killed half-way, started again, reported. For `make test-all`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.conftest import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

SMOKE = ROOT / "recipes" / "comparison" / "smoke.yaml"
CELLS = {f"loopholes.{arm}.seed-{seed}" for arm in ("off", "persona") for seed in (0, 1)}


@pytest.fixture(scope="module")
def grid(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, on the environment that other tests use and with checkpoints."""
    keys = yaml.load(SMOKE.read_text(), yaml.BaseLoader)  # every value as text: off stays off
    numbers = {"seeds": [int(seed) for seed in keys["seeds"]], "steps": int(keys["steps"]), "control": None}
    places = [{"name": "loopholes", "dir": str(environment), "split": "test"}]
    path = tmp_path_factory.mktemp("grid") / "smoke.yaml"
    path.write_text(yaml.safe_dump({**keys, **numbers, "limit_s": 1500, "environments": places, "save_every": 1}))
    return path


def vgr(*arguments: object, **keywords) -> subprocess.Popen:
    command = [sys.executable, "-m", "verl_grad_routing.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **keywords)


def test_killed_half_way_and_started_again(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    second = out / "loopholes" / "persona" / "seed-0"
    with (tmp_path / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "verl_grad_routing.cli", "compare", str(grid), "--to", str(out)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    latest, end = second / "checkpoints" / "latest_checkpointed_iteration.txt", time.monotonic() + 1500
    while not latest.is_file():
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log.txt").read_text()[-3000:]
        time.sleep(0.2)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert not psutil.wait_procs(family, timeout=90)[1]
    first = out / "loopholes" / "off" / "seed-0" / "run.json"
    before = (first.read_bytes(), first.stat().st_mtime_ns)

    again = vgr("compare", grid, "--to", out)
    told, _ = again.communicate(timeout=2400)
    assert again.returncode == 0, told[-3000:]
    assert "4 cells, 1 finished before" in told
    assert before == (first.read_bytes(), first.stat().st_mtime_ns)
    results = {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("loopholes.*.json")}
    assert results.keys() == CELLS and {data["status"] for data in results.values()} == {"finished"}
    for name, data in results.items():
        assert data["curves"]["hack/rate"]["steps"] == [1, 2], name
        views = [entry["deployed"] for entry in data["validations"] if entry["step"] == 2]
        assert views == ([False, True] if data["arm"] == "persona" else [False]), name
        assert all(entry["overall"]["total"] == 64 for entry in data["validations"])
        assert str(tmp_path) not in json.dumps(data)

    third = vgr("compare", grid, "--to", out)
    told, _ = third.communicate(timeout=600)
    assert third.returncode == 0 and "4 cells, 4 finished before" in told, told[-3000:]

    tables = []
    for name in ("a", "b"):
        done = vgr("report", out / "results", "--to", tmp_path / name)
        told, _ = done.communicate(timeout=300)
        assert done.returncode == 0, told
        tables.append({path.name: path.read_bytes() for path in (tmp_path / name / "tables").iterdir()})
    assert tables[0] == tables[1] and "loopholes-hack-as-deployed-paired-differences.md" in tables[0]
    assert "persona minus off" in (tmp_path / "a" / "report.html").read_text()
