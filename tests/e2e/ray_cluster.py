"""A Ray of the test session's own, on which whole runs take turns."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Between the ports that Ray gives its workers and those that the system gives to whoever asks: gRPC would let two Rays
# that start side by side share one.
PORTS = range(20000, 32000)
STARTS = 3
PATIENCE_S = 90.0


@contextmanager
def ray_cluster(folder: Path) -> Iterator[str]:
    """A running Ray's address; its log is in ``folder``. Ray, and whatever runs on it, ends with the block.

    Its first job is taken, see ``lane`` in conftest.py. A start that nobody can connect to is given up for another.
    """
    with _token():
        yield from _started(folder)


@contextmanager
def _token() -> Iterator[None]:
    """A token of our own, for Ray and for everybody who connects from inside.

    Left to itself, ``ray start`` asks for a token where one lies in the home folder, which any local Ray may have put
    there, while those who connect send none.
    """
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _started(folder: Path) -> Iterator[str]:
    for attempt in range(STARTS):
        log, port, mark = folder / f"log-{attempt}.txt", _free_port(), f"vgr-{uuid.uuid4().hex}"
        address = f"127.0.0.1:{port}"
        process = _start(folder / f"processes-{attempt}.json", port, mark, log)
        try:
            if _answers(address, mark, process, log):
                yield address
                return
        finally:
            process.stdin.close()  # the supervisor ends all that it started
            process.wait(60)
    raise AssertionError(f"no Ray after {STARTS} starts: {log.read_text()[-2000:]}")


def _free_port() -> int:
    """A port of ``PORTS`` that nobody listens on, at any address."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as free:
            try:
                free.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no free port in {PORTS}")


def _start(processes: Path, port: int, mark: str, log: Path) -> subprocess.Popen:
    scratch = tempfile.mkdtemp(prefix="vgr-", dir="/tmp")  # a short name: Ray's sockets lie below it
    command = [sys.executable, "-m", "verl_grad_routing.compare.supervisor", processes, scratch, "10"]
    command += [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--temp-dir={scratch}", "--num-cpus=32", "--num-gpus=1"]
    command += [f"--resources={json.dumps({mark: 1})}"]
    command += ["--object-store-memory=1000000000", "--include-dashboard=false", "--disable-usage-stats"]
    with log.open("wb") as output:
        return subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=output, stderr=output)


def _answers(address: str, mark: str, process: subprocess.Popen, log: Path) -> bool:
    """Whether the Ray at ``address`` answers in time and is the one that was started with the resource ``mark``."""
    ask = f"import ray; ray.init(address={address!r}, log_to_driver=False); assert {mark!r} in ray.cluster_resources()"
    connect = [sys.executable, "-c", ask]
    end = time.monotonic() + PATIENCE_S
    with log.open("ab") as output:
        while process.poll() is None and time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                if subprocess.run(connect, stdout=output, stderr=output, timeout=60, check=False).returncode == 0:
                    return True
    return False
