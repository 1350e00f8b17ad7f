"""Runs that a test ends half-way: started with an owner of all their processes, killed as hard as asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

MAIN = (sys.executable, "-m", "verl.trainer.main_ppo")


OWN_RAY = "++ray_kwargs.ray_init.address=local"


def start(folder: Path, arguments: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """``main_ppo`` in a session of its own, metrics and log in ``folder``; with a Ray of its own unless given another.

    Hydra's flags come first: its parser takes none after an override.
    """
    flags = [argument for argument in arguments if argument.startswith("--")]
    overrides = [argument for argument in arguments if not argument.startswith("--")]
    folder.mkdir(parents=True, exist_ok=True)
    own = {"VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), "HYDRA_FULL_ERROR": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [*MAIN, *flags, OWN_RAY, *overrides, "trainer.logger=[console,file]", f"hydra.run.dir={folder / 'hydra'}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | own | (environment or {}),
            start_new_session=True,
        )


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and all its descendants."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def still_alive(processes: Sequence[psutil.Process], patience_s: float) -> list[psutil.Process]:
    """Those of ``processes`` that have not ended within ``patience_s``."""
    return psutil.wait_procs(processes, timeout=patience_s)[1]


@contextmanager
def running(folder: Path, arguments: Sequence[str], environment: dict[str, str] | None = None):
    """A run that is killed with all its descendants at the end of the block, if it still runs."""
    process = start(folder, arguments, environment)
    seen: dict[int, psutil.Process] = {}
    try:
        yield process, seen
    finally:
        seen.update({member.pid: member for member in family(process)})
        for member in seen.values():
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.wait(30)
        psutil.wait_procs(list(seen.values()), timeout=30)


def wait_for(
    process: subprocess.Popen, seen: dict[int, psutil.Process], done: Callable[[], bool], limit_s: float, log: Path
) -> None:
    """Wait until ``done``; remember every descendant seen on the way. Fails when the run ends or takes too long."""
    end = time.monotonic() + limit_s
    while not done():
        seen.update({member.pid: member for member in family(process)})
        tail = log.read_text(errors="replace")[-2000:]
        assert process.poll() is None, f"the run ended with status {process.returncode}: {tail}"
        assert time.monotonic() < end, f"not done after {limit_s} s: {tail}"
        time.sleep(0.5)
    seen.update({member.pid: member for member in family(process)})


def steps_done(folder: Path) -> int:
    """The last training step in the metrics file."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return max((row["step"] for row in rows), default=0)
