"""Checkpoints compared bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

ACTOR = Path("actor")
MODEL, OPTIMIZER, EXTRA = (f"{kind}_world_size_1_rank_0.pt" for kind in ("model", "optim", "extra_state"))


def saved(folder: Path, name: str):
    return torch.load(folder / name, weights_only=False)


def assert_same(a, b, where: str = "") -> None:
    """Equal trees, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        a, b = (x.to_local() if hasattr(x, "to_local") else x for x in (a, b))
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, where=f"{where}/{index}")
    elif hasattr(a, "shape"):
        assert (a == b).all(), where
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} {b}"


def assert_moved(step: Path, start: Path, what: str) -> None:
    """Some adapter tensor of the block differs: the comparison is not of two runs that did nothing."""
    a, b = saved(step, MODEL), saved(start, MODEL)
    assert any(not torch.equal(a[k].to_local(), b[k].to_local()) for k in a if what in k)
