"""Progress of a long computation: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINES = 10


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that counts one step and shows a note beside the count; output goes to standard error."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("[progress.description]{task.description}")
        note = TextColumn("{task.fields[note]}")
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda text: bar.update(task, advance=1, note=text)
    else:
        done = 0
        every = max(1, total // LINES)

        def step(text: str) -> None:
            nonlocal done
            done += 1
            if done % every == 0 or done == total:
                print(f"{title}: {done}/{total} {text}", file=sys.stderr, flush=True)

        yield step
