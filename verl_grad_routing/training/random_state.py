"""Whatever draws random numbers inside leaves the generators as they were: for looking at a run without changing it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def same_random_state(device: str = "cpu") -> Iterator[None]:
    """Python's, numpy's and torch's generators are restored at the end, the current accelerator's of ``device`` too."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device == "cpu" else [getattr(torch, device).current_device()]
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda" if device == "cpu" else device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
