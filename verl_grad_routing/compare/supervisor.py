"""Runs one command, owns every process that comes of it, and leaves none behind, whatever ends it.

    python -m verl_grad_routing.compare.supervisor REPORT SCRATCH PATIENCE COMMAND...

Ray's daemons and workers, vLLM's engines and their helpers live in process groups and sessions of their own. This
process asks the kernel to hand it every orphan among its descendants (``PR_SET_CHILD_SUBREAPER``), so that all of them
stay its descendants; other Rays on the machine never are. It ends them when the command has ended, when standard input
closes (its parent ended it, or is gone, killed outright even), and on SIGTERM. Then it deletes the folder SCRATCH and
the shared-memory files that only they used, and writes REPORT, a JSON object: ``status``, ``stopped`` (ended early),
``peak_rss_bytes``, ``peak_private_bytes``. PATIENCE is the seconds that the command has to end after an interrupt;
what it leaves has a part of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# Measured more and more rarely, so that short runs are seen and long ones not disturbed.
FIRST_S, GROWTH, MEMORY_EVERY_S, SHARED_EVERY_S = 0.1, 1.5, 2.0, 10.0
# Parts of the patience: descendants to end by themselves after the command, and then after SIGTERM.
ORPHANS, TERMINATED = 0.4, 0.3
KILLED_S = 10.0
SHARED_FILE = re.compile(r"\s(/dev/shm/\S+)$", re.MULTILINE)


@dataclass
class Report:
    """What the supervisor found; see the module's docstring."""

    status: int = 0
    stopped: bool = False
    peak_rss_bytes: int = 0
    peak_private_bytes: int = 0


class Supervisor:
    """The command's processes: started, measured, ended."""

    def __init__(self, command: Sequence[str], patience_s: float):
        self.patience_s = patience_s
        self.report = Report()
        self.shared_files: set[Path] = set()
        self.started = time.time()
        self.exits: dict[int, int] = {}
        self.stop_asked = False
        _adopt_orphans()
        signal.signal(signal.SIGTERM, self._ask_stop)
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def run(self) -> Report:
        """Until the command has ended or must; afterwards no process of its is left."""
        memory, shared = _Rarely(MEMORY_EVERY_S), _Rarely(SHARED_EVERY_S)
        listening = [sys.stdin.fileno()]
        while not self._ended() and not self.stop_asked:
            if memory.due():
                self._measure()
            if shared.due():
                self._note_shared_files()
            readable, _, _ = select.select(listening, [], [], 0.1)
            if readable and not os.read(listening[0], 1024):
                self.stop_asked = True
        self.report.stopped = not self._ended()
        self._end_all()
        self.report.status = self.exits.get(self.child.pid, -int(signal.SIGKILL))
        return self.report

    def _ask_stop(self, signum: int, frame: FrameType | None) -> None:
        self.stop_asked = True

    def _ended(self) -> bool:
        """Whether the command itself has; reaps whatever has, adopted orphans too."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self.exits[found[0]] = os.waitstatus_to_exitcode(found[1])
        return self.child.pid in self.exits

    def _descendants(self) -> list[psutil.Process]:
        self._ended()
        return psutil.Process().children(recursive=True)

    def _measure(self) -> None:
        rss = private = 0
        for process in self._descendants():
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                rss += memory.rss
                private += memory.rss - getattr(memory, "shared", 0)
        self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, rss)
        self.report.peak_private_bytes = max(self.report.peak_private_bytes, private)

    def _note_shared_files(self) -> None:
        """POSIX shared memory outlives a process that is killed; remember what ours have mapped."""
        for process in self._descendants():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
                self.shared_files.update(Path(name) for name in SHARED_FILE.findall(maps))

    def _end_all(self) -> None:
        self._note_shared_files()
        if not self._ended():
            self.child.send_signal(signal.SIGINT)  # the driver shuts its Ray down in order
            self._wait(self.patience_s, only_child=True)
        self._wait(ORPHANS * self.patience_s if self._ended() else 0.0)
        for signum, patience in ((signal.SIGTERM, TERMINATED * self.patience_s), (signal.SIGKILL, KILLED_S)):
            self._wait(patience, signum)
        for path in self.shared_files:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ctime >= self.started - 1:
                    path.unlink()

    def _wait(self, seconds: float, signum: int | None = None, only_child: bool = False) -> None:
        """Until all are gone or ``seconds`` have passed; each gets ``signum`` once, newcomers too."""
        signalled: set[int] = set()
        end = time.monotonic() + seconds
        while True:
            left = self._descendants()
            if not left or (only_child and self._ended()) or time.monotonic() >= end:
                return
            for process in left:
                if signum is not None and process.pid not in signalled:
                    signalled.add(process.pid)
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(signum)
            time.sleep(0.05)


class _Rarely:
    """Due at once, then after waits that grow up to ``longest_s``."""

    def __init__(self, longest_s: float):
        self.longest_s, self.wait_s, self.next = longest_s, FIRST_S, 0.0

    def due(self) -> bool:
        """Whether it is time; if so, the next time is set."""
        now = time.monotonic()
        if now < self.next:
            return False
        self.next, self.wait_s = now + self.wait_s, min(self.longest_s, self.wait_s * GROWTH)
        return True


def _adopt_orphans() -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def main(arguments: Sequence[str]) -> int:
    """As the module's docstring says; returns the command's exit status, 128 + n when signal n ended it."""
    report_path, scratch, patience_s, *command = arguments
    try:
        report = Supervisor(command, float(patience_s)).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    Path(report_path).write_text(json.dumps(asdict(report)), encoding="utf-8")
    return report.status if report.status >= 0 else 128 - report.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
