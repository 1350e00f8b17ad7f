"""Freed memory stays with the process while a benchmark runs, as an accelerator's allocator keeps it.

By default glibc hands large freed pieces back and takes them again, zeroed and page by page. How often, its heuristics
decide and what ran before, and the side of a pair that holds a little more does it more often. A layer's cost is told
from that only where neither side does.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt(3)
_NEVER = -1


def keep_freed_memory(grow_by: int = 1 << 30) -> bool:
    """Never give memory back and grow by ``grow_by`` bytes at once; whether the C library can (glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        print(
            "this C library gives freed memory back: ratios include the pages that either side takes anew", flush=True
        )
        return False
    settings = ((_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, grow_by), (_MMAP_MAX, 0))
    return all([mallopt(option, value) for option, value in settings])
