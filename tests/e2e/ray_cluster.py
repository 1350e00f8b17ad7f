"""A Ray of the test session's own, on which whole runs take turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl_grad_routing.compare.own_ray import own_ray

SIZES = {"num_cpus": 32, "num_gpus": 2, "object_store_memory": 1_000_000_000}


@contextmanager
def ray_cluster(folder: Path) -> Iterator[str]:
    """A running Ray's address; its log is in ``folder``. Ray, and whatever runs on it, ends with the block.

    Its first job is taken, see ``lane`` in conftest.py.
    """
    with own_ray(2, SIZES, folder / "ray.log") as address:
        yield address
