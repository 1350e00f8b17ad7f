"""One program in one sandbox: a job goes in, at most one line comes out, and nothing outlives the call."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from verl_grad_routing.envs.sandbox.launch import Launcher, SandboxError
from verl_grad_routing.envs.sandbox.limits import Limits

READY = b"ready\n"
ATTEMPTS = 3  # a sandbox that does not come up is no finding about the candidate
IN_SANDBOX = ("cpu_s", "memory_mb", "file_mb", "files", "processes")
COMPLAINT = 4096  # bytes of bubblewrap's own complaint that are kept
CHUNK = 1 << 16


@dataclass(frozen=True)
class Completed:
    """How a program ended.

    Attributes:
        end: ``line`` (it sent a line), ``exit`` (it ended without one), ``timeout`` or ``flood`` (too much output).
        line: What it sent, without the line break; empty unless ``end`` is ``line``.
        status: Exit status, negative for a signal, when it ended by itself.
    """

    end: str
    line: bytes = b""
    status: int | None = None


def run(launcher: Launcher, program: Path, job: Mapping[str, Any], limits: Limits) -> Completed:
    """Run the Python file ``program`` in a sandbox of its own and hand it ``job``.

    Returns within ``limits.start_s`` (thrice, at the worst) plus ``limits.wall_s``, whatever the program does, and the
    sandbox is killed with all that is in it.

    Raises:
        SandboxError: The sandbox did not come up. The candidate was not run.
    """
    names = [name for name in IN_SANDBOX if not (launcher.unsafe and name == "processes")]
    request = json.dumps({**job, "limits": {name: getattr(limits, name) for name in names}}).encode()
    complaint = ""
    with contextlib.ExitStack() as stack:
        folder = "/"
        if launcher.unsafe:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vgr-unsafe-", ignore_cleanup_errors=True))
        for _ in range(ATTEMPTS):
            with _Process(launcher.command(program, limits), folder) as process:
                if process.starts(limits.start_s):
                    return process.converse(request, limits)
                complaint = process.complaint()
    raise SandboxError(complaint or "did not start", "let this user make user namespaces (see docs/environments.md)")


class _Process:
    """A process group with pipes, read with deadlines, killed on leaving."""

    def __init__(self, command: list[str], folder: str):
        pipe = subprocess.PIPE
        environment = {"PYTHONHASHSEED": "0", "PATH": os.defpath}
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, cwd=folder, start_new_session=True
        )
        self.streams: list[IO[bytes]] = [s for s in (self.process.stdin, self.process.stdout, self.process.stderr) if s]
        self.request, self.output, self.errors = self.streams
        for stream in self.streams:
            os.set_blocking(stream.fileno(), False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.output, selectors.EVENT_READ)
        self.selector.register(self.errors, selectors.EVENT_READ)
        self.received, self.complained = bytearray(), bytearray()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.selector.close()
        for stream in self.streams:
            with contextlib.suppress(OSError):  # a flush of what was never read
                stream.close()

    def starts(self, seconds: float) -> bool:
        """Has the runner in the sandbox said that it is up?"""
        deadline = time.monotonic() + seconds
        while len(self.received) < len(READY) and self._pump(deadline, len(READY)):
            pass
        return bytes(self.received) == READY

    def converse(self, request: bytes, limits: Limits) -> Completed:
        """Send the job and read one line."""
        self.received.clear()
        deadline = time.monotonic() + limits.wall_s
        most = limits.output_kb << 10
        self._pending = memoryview(request)
        self.selector.register(self.request, selectors.EVENT_WRITE)
        while self._pump(deadline, most + 1):
            if (end := self.received.find(b"\n")) >= 0:
                return Completed("line", bytes(self.received[:end]))
            if len(self.received) > most:
                return Completed("flood")
        if time.monotonic() >= deadline:
            return Completed("timeout")
        return self._ended(deadline)

    def _ended(self, deadline: float) -> Completed:
        try:
            status = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Completed("timeout")
        return Completed("exit", status=status)

    def complaint(self) -> str:
        """One line of what bubblewrap said."""
        deadline = time.monotonic() + 1.0
        while self._pump(deadline, COMPLAINT):
            pass
        return " ".join(self.complained.decode(errors="replace").split())[:300]

    def _pump(self, deadline: float, most: int) -> bool:
        """Move what is ready. False at the deadline or when the output has ended."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        for key, _ in self.selector.select(left):
            if key.fileobj is self.request:
                self._write()
            elif key.fileobj is self.errors:
                self._read(self.errors, self.complained, COMPLAINT)
            elif not self._read(self.output, self.received, most):
                return False
        return True

    def _read(self, stream: IO[bytes], into: bytearray, most: int) -> bool:
        """Read what is there, keeping at most ``most`` bytes; False at its end."""
        try:
            data = os.read(stream.fileno(), CHUNK)
        except BlockingIOError:
            return True
        if not data:
            self.selector.unregister(stream)
        into += data[: max(0, most - len(into))]
        return bool(data)

    def _write(self) -> None:
        try:
            self._pending = self._pending[os.write(self.request.fileno(), self._pending[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._pending = self._pending[:0]
        if not self._pending:
            self.selector.unregister(self.request)
            with contextlib.suppress(BrokenPipeError):
                self.request.close()
