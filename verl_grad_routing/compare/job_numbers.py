"""Numbers of Ray jobs for runs at once on one machine, whoever starts them.

verl 0.9.1 names its socket for weights after the Ray job and deletes whatever has that name before it binds: of two
runs whose jobs have one number, each may load the other's weights. The first job of every Ray has the same number, so
a number is held machine-wide, as a locked file beside the sockets.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

FOLDER = Path("/tmp")  # fixed in verl, whatever TMPDIR says (tests/compat): who trains must look where others do


@contextmanager
def reserved(least: int = 1) -> Iterator[int]:
    """The smallest number from ``least`` on that no other process holds; free again when the block, or process, ends.

    1 is the number of the first job of a Ray that verl starts itself; others need ``own_ray``.
    """
    for number in count(least):
        try:
            lock = os.open(FOLDER / f"verl-grad-routing-job-{number}.lock", os.O_RDONLY | os.O_CREAT, 0o666)
        except PermissionError:  # another user's, and the system lets nobody else open it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        try:
            yield number
        finally:
            os.close(lock)
        return
