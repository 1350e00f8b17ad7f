"""Many verdicts at once: one thread per core, each starting one sandbox after another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from verl_grad_routing.envs.sandbox.launch import Launcher, SandboxError
from verl_grad_routing.envs.sandbox.limits import Limits
from verl_grad_routing.envs.sandbox.process import run
from verl_grad_routing.envs.sandbox.strict import Report, Task, grade

T = TypeVar("T")
PACKAGE = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("probe.py")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Pool:
    """Threads that grade candidates; a context manager.

    The sandboxes' lives are tied to the thread that starts them, so verdicts are made by the pool's own threads, which
    live as long as it does.

    Args:
        workers: Verdicts at a time; the machine's cores by default.
        limits: Of every verdict.
        unsafe: No sandbox. Candidate code then has the caller's own rights.
        bwrap: The bubblewrap binary, if not the one found.

    Raises:
        SandboxError: The sandbox cannot be used here; told before any candidate is run.
    """

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits | None = None,
        *,
        unsafe: bool = False,
        bwrap: str | None = None,
    ):
        self.limits = limits or Limits()
        self.launcher = Launcher.find(unsafe=unsafe, bwrap=bwrap)
        check(self.launcher, self.limits)
        self.workers = workers or cores()
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="vgr-sandbox")

    def submit(self, source: str, task: Task) -> Future[Report]:
        """Grade one candidate; the future's result never blocks beyond the limits once a thread is free."""
        return self.call(grade, self.launcher, source, task, self.limits)

    def grade(self, source: str, task: Task) -> Report:
        """Grade one candidate and wait for it."""
        return self.submit(source, task).result()

    def grade_all(self, candidates: Iterable[tuple[str, Task]]) -> list[Report]:
        """Grade many, in order."""
        return [future.result() for future in [self.submit(source, task) for source, task in candidates]]

    def call(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run ``function`` on one of the pool's threads."""
        return self._threads.submit(function, *arguments)

    def close(self) -> None:
        """Finish what is running, drop what is waiting."""
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check(launcher: Launcher, limits: Limits) -> None:
    """Start one sandbox and look around in it. Raises ``SandboxError`` when it does not start or does not hold."""
    if launcher.unsafe:
        return
    job = {"hidden": [str(PACKAGE), os.path.expanduser("~/.ssh"), "/etc/passwd", "/proc/self", "/sys/kernel"]}
    found = run(launcher, PROBE, job, limits)
    if found.line != b'{"leaks": []}':
        raise SandboxError(
            f"leaks {found.line.decode(errors='replace')[:200]} ({found.end})", "do not use this machine"
        )
