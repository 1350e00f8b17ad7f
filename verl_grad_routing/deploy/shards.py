"""Whole tensors from the files of all ranks.

Every rank saves its part of the model's state dict: DTensors over a device mesh, sharded along one of its dimensions
(FSDP2) and perhaps replicated along another (HSDP). The parts are memory-mapped and put together one tensor at a time,
in a process that has no process group.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard  # also lets weights_only unpickle DTensors

from verl_grad_routing.errors import UserError


class ShardedState(Mapping[str, Tensor]):
    """The state dict of a model that verl's FSDP checkpoint manager saved, with whole tensors as values.

    Args:
        folder: The ``actor`` folder.

    Raises:
        UserError: A rank's file is missing, unreadable, or has other parameters than rank 0's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        world_size = json.loads((folder / "fsdp_config.json").read_text())["world_size"]
        paths = [folder / f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]
        for path in paths:
            if not path.is_file():
                raise UserError("CHECKPOINT", str(path), "missing; the checkpoint needs the files of all ranks")
        with _quiet_meshes():
            self._ranks = [_load(path) for path in paths]
        for path, state in zip(paths, self._ranks, strict=True):
            if state.keys() != self._ranks[0].keys():
                raise UserError("CHECKPOINT", str(path), "has other parameters than rank 0's; take another checkpoint")

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks[0])

    def __len__(self) -> int:
        return len(self._ranks[0])

    def __getitem__(self, name: str) -> Tensor:
        first = self._ranks[0][name]
        if not isinstance(first, DTensor):
            return first
        parts = [state[name] for state in self._ranks]
        sharded = [dim for dim, placement in enumerate(first.placements) if not placement.is_replicate()]
        if len(sharded) > 1 or any(type(first.placements[dim]) is not Shard for dim in sharded):
            fix = "only tensors sharded along one mesh dimension can be put together"
            raise UserError(f"CHECKPOINT ({name})", str(first.placements), fix)
        if not sharded:
            return first._local_tensor
        # The ranks of one replica, in the order of the mesh dimension that is sharded.
        mesh = first.device_mesh.mesh.movedim(sharded[0], -1).reshape(-1, first.device_mesh.mesh.shape[sharded[0]])
        dim = first.placements[sharded[0]].dim  # type: ignore[attr-defined]
        whole = torch.cat([parts[rank]._local_tensor for rank in mesh[0].tolist()], dim=dim)
        if whole.shape != first.shape:
            fix = f"the ranks' parts make {tuple(whole.shape)}; the checkpoint is damaged, take another"
            raise UserError(f"CHECKPOINT ({name})", tuple(first.shape), fix)
        return whole


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError("CHECKPOINT", str(path), f"cannot be read ({str(error).splitlines()[0]})") from None


@contextmanager
def _quiet_meshes() -> Iterator[None]:
    """torch warns for every mesh that is unpickled without a process group; none is needed here."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
