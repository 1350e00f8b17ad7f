"""A Ray of one run's own, in which the run's job has a number that no run beside it has.

    python -m verl_grad_routing.compare.own_ray NUMBER SIZES COMMAND...

verl 0.9.1 names its socket for weights after the Ray job, and the first job of every Ray has the same number; and
TransferQueue, which carries the rollouts, is one per Ray. So runs at once on one machine need a Ray each,
and jobs of different numbers. This starts a Ray, takes the numbers before NUMBER, and runs COMMAND, with overrides that
connect it, as job NUMBER. SIZES is JSON: ``num_cpus``, ``num_gpus`` (null: as Ray finds), as in ``ray.init``.
Ray runs under ``supervisor``: nothing of it is left, however this process ends.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from verl_grad_routing.errors import UserError

# Between the ports that Ray gives its workers and those that the system gives to whoever asks: gRPC would let two Rays
# that start side by side share one.
PORTS = range(20000, 32000)
STARTS, ANSWERS_S = 3, 90.0
PATIENCE_S, ENDS_S = 10.0, 60.0  # for Ray to shut down in order, and for its supervisor to be done
RAY = "++ray_kwargs.ray_init"
# Connect until the job after this one has the number; the resource tells our Ray from another that has its port.
TAKE_NUMBERS = """
import ray
job = 0
while job < {last}:
    ray.init(address={address!r}, log_to_driver=False)
    assert {mark!r} in ray.cluster_resources()
    job = int.from_bytes(bytes.fromhex(ray.get_runtime_context().get_job_id()), "little")
    ray.shutdown()
assert job == {last}
"""


@contextmanager
def own_ray(number: int, sizes: Mapping[str, float | None], log: Path) -> Iterator[str]:
    """The address ``host:port`` of a Ray on this machine whose next job has the number ``number``.

    Environment variables of this process, and of what it starts, let them connect. Ray ends with the block.

    Args:
        number: At least 2: connecting to see whether it answers takes a number, too.
        sizes: ``num_cpus`` and ``num_gpus``, as in ``ray.init``.
        log: File for what Ray says.

    Raises:
        UserError: No Ray that answers after a few starts.
    """
    if number < 2:
        raise UserError("number", number, "the first job of a Ray asks whether it answers; give at least 2")
    with _token():
        for _ in range(STARTS):
            port, mark = _free_port(), f"vgr-{uuid.uuid4().hex}"
            address = f"127.0.0.1:{port}"
            process = _start(port, mark, sizes, log)
            try:
                if _answers(address, mark, number - 1, process, log):
                    yield address
                    return
            finally:
                assert process.stdin is not None
                process.stdin.close()  # the supervisor ends all that it started
                process.wait(ENDS_S)
        told = (log.read_text(errors="replace").splitlines() or ["nothing"])[-1]
        raise UserError("ray start", f"{STARTS} starts", f"none answered; the last said: {told} (the whole log: {log})")


def connected(address: str) -> list[str]:
    """Overrides for a run on the Ray at ``address`` in place of one that it starts; the sizes are that Ray's."""
    quoted = address if re.fullmatch(r"\w+", address) else f"'{address}'"
    return [f"{RAY}.address={quoted}", *(f"{RAY}.{key}=null" for key in ("_temp_dir", "num_cpus", "num_gpus"))]


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


def _free_port() -> int:
    """A port of ``PORTS`` that nobody listens on, at any address."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as free:
            try:
                free.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError("port", f"{PORTS.start} to {PORTS.stop - 1}", "no free one among a hundred; end what listens there")


def _start(port: int, mark: str, sizes: Mapping[str, float | None], log: Path) -> subprocess.Popen[bytes]:
    scratch = tempfile.mkdtemp(prefix="r-")  # a short name: Ray's sockets lie below it
    command = [sys.executable, "-m", "verl_grad_routing.compare.supervisor", f"{log}.json", scratch, str(PATIENCE_S)]
    command += [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={scratch}"]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in sizes.items() if value is not None]
    command += [f"--resources={json.dumps({mark: 1})}", "--include-dashboard=false", "--disable-usage-stats"]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)


def _answers(address: str, mark: str, last: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Whether the Ray at ``address`` is the one with the resource ``mark`` and has given its job number ``last``."""
    ask = [sys.executable, "-c", TAKE_NUMBERS.format(address=address, mark=mark, last=last)]
    end = time.monotonic() + ANSWERS_S
    with log.open("ab") as output:
        while process.poll() is None and time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                if subprocess.run(ask, stdout=output, stderr=output, timeout=60, check=False).returncode == 0:
                    return True
    return False


def main(arguments: Sequence[str]) -> int:
    """See the module's docstring."""
    number, sizes, *command = arguments
    with own_ray(int(number), json.loads(sizes), Path(tempfile.gettempdir()) / "ray.log") as address:
        return subprocess.run([*command, *connected(address)], check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(str(error))
