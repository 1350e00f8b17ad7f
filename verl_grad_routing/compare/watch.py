"""Progress of a training run, read from the metrics file that it is writing: a bar on a terminal, lines in a pipe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LINES = 10  # at most about so many lines in a pipe


@dataclass
class State:
    """How far a run is: steps done, of how many (None until known), hack rate of the last step's rollouts."""

    step: int = 0
    total: int | None = None
    hack: float | None = None

    @property
    def hack_text(self) -> str:
        """The rate for people."""
        return f"hack rate {self.hack:.2f}" if self.hack is not None else "starting verl" if self.step == 0 else ""


class MetricsTail:
    """Reads the lines that were appended to a metrics file since the last call."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0

    def update(self, state: State) -> None:
        """Bring ``state`` up to date; a line that is still being written waits for the next call."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(complete) + len(newline)
        for line in complete.splitlines():
            row = json.loads(line)
            state.step = max(state.step, row["step"])
            if row["data"].get("hack/rate") is not None:
                state.hack = row["data"]["hack/rate"]


@contextmanager
def progress(name: str, bar: bool = True) -> Iterator[Callable[[State], None]]:
    """Yield a function that shows a ``State``; on standard error, so that tables can be piped. Lines unless ``bar``."""
    if bar and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note)
        with Progress(*columns, console=Console(stderr=True)) as shown:
            task = shown.add_task(name, total=None, note="starting verl")
            yield lambda state: shown.update(task, completed=state.step, total=state.total, note=state.hack_text)
    else:
        yield _lines(name)


def _lines(name: str) -> Callable[[State], None]:
    started, shown = time.monotonic(), -1

    def show(state: State) -> None:
        nonlocal shown
        every = max(1, (state.total or LINES) // LINES)
        if shown >= 0 and state.step < shown + every and (state.step != state.total or state.step == shown):
            return
        shown = state.step
        of = f"/{state.total}" if state.total else ""
        elapsed = time.monotonic() - started
        print(f"{name}: step {state.step}{of}, {state.hack_text}, {clock(elapsed)}", file=sys.stderr, flush=True)

    return show


def clock(seconds: float) -> str:
    """``m:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
