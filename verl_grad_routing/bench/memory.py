"""Freed memory stays with the process while a benchmark runs, as an accelerator's allocator keeps it.

By default glibc hands large freed pieces back and takes them again, zeroed and page by page. Which update of a pair
that hits, its heuristics decide and what ran before: on the embedded model's update it was none or ten thousand page
faults, 4% of the time, and nearly always the side with a little more to hold.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt(3)


def keep_freed_memory(grow_by: int = 1 << 30) -> bool:
    """Never give memory back and grow by ``grow_by`` bytes; whether the C library can (glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, grow_by), (_MMAP_MAX, 0))
    return all([mallopt(option, value) for option, value in settings])
