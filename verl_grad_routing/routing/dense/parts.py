"""Each block's part of every parameter, as an optimizer can step it alone.

One weight holds rows (or columns) of both blocks, and an optimizer's state, step counter and weight decay belong to
whole parameters. So the optimizer is given *views*: for every parameter one handle a run of rows or columns of one
block, sharing the parameter's memory. Each block then has its own moments, its own count of steps and its own group,
and a block without mass is left alone by ``grad = None``, as everywhere in torch; nothing is saved and put back.

Views are made anew for every step, for sharded training may move a parameter's storage between steps (offloading),
and dropped after it, so that they do not keep storage alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.dense.units import Range, Role, ranges_of

BLOCKS = ("deployed", "quarantine", "shared")


@dataclass
class Piece:
    """A run of one parameter's local shard along ``dim``; ``handle`` is what the optimizer holds."""

    parameter: nn.Parameter
    block: str
    dim: int
    run: Range
    handle: nn.Parameter

    def view(self, whole: Tensor) -> Tensor:
        shard = whole.to_local() if isinstance(whole, DTensor) else whole
        return shard.detach().narrow(self.dim, self.run[0], self.run[1] - self.run[0])


class BlockParts:
    """Views of all parameters, by block.

    Args:
        parameters: Name to parameter, sharded or not.
        role: Role of a parameter by its name.

    Attributes:
        blocks: The handles of ``deployed``, ``quarantine`` and, where there are any on some rank, ``shared``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], role: Callable[[str], Role]):
        self.pieces: list[Piece] = []
        self._groups: list[dist.ProcessGroup] = []
        self._any = next(iter(parameters.values()))
        roles = {name: role(name) for name in parameters}
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor) and not self._groups:
                self._groups = _shard_groups(parameter)
            self.pieces += _pieces(parameter, roles[name])
        wanted = BLOCKS if any(role.shared for role in roles.values()) else BLOCKS[:2]
        self.blocks = {block: [piece.handle for piece in self.pieces if piece.block == block] for block in wanted}

    @torch.no_grad()
    def bind(self) -> None:
        """Point every handle at its parameter's storage and gradient as they are now."""
        for piece in self.pieces:
            piece.handle.data = piece.view(piece.parameter)
            gradient = piece.parameter.grad
            piece.handle.grad = None if gradient is None else piece.view(gradient)

    @torch.no_grad()
    def release(self) -> None:
        """Let go of storage and gradients."""
        for piece in self.pieces:
            piece.handle.grad = None
            piece.handle.data = piece.handle.data.new_empty(0)

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """Euclidean norm over all ranks of tensors that are this rank's parts (every rank takes part)."""
        device = self._any.device
        norm = torch.nn.utils.get_total_norm(list(tensors)) if tensors else torch.zeros(())
        squares = norm.to(device, torch.float64).square()
        for group in self._groups:
            dist.all_reduce(squares, group=group)
        return float(squares.sqrt())


def _shard_groups(parameter: DTensor) -> list[dist.ProcessGroup]:
    """The groups over which a parameter is cut (not those over which it is replicated)."""
    mesh = parameter.device_mesh
    return [mesh.get_group(dim) for dim, placement in enumerate(parameter.placements) if placement.is_shard()]


def _pieces(parameter: nn.Parameter, role: Role) -> list[Piece]:
    shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    first, split = ("shared", ()) if role.shared else ("deployed", role.ranges)
    dim = role.dim if split else role.dead_dim if role.dead else 0
    assert dim is not None
    runs = {first: [(0, shard.shape[0])]}
    if split or role.dead:
        local = _local_flags(parameter, dim, split, role.dead)
        runs = {
            block: ranges_of((local == flag).nonzero().flatten().tolist())
            for block, flag in ((first, 0), ("quarantine", 1))
        }
    made = []
    for block, found in runs.items():
        for run in found:
            if run[1] > run[0] and shard.numel():
                piece = Piece(parameter, block, dim, run, nn.Parameter(shard.detach().new_empty(0)))
                piece.handle.data = piece.view(parameter)
                made.append(piece)
    return made


def _local_flags(parameter: nn.Parameter, dim: int, ranges: Sequence[Range], dead: Sequence[Range]) -> Tensor:
    """1 for the quarantine's rows or columns of the local shard, 2 for padding, 0 for the others."""
    flags = torch.zeros(parameter.shape[dim], dtype=torch.int32, device=parameter.device)
    for flag, runs in ((1, ranges), (2, dead)):
        for first, last in runs:
            flags[first:last] = flag
    if not isinstance(parameter, DTensor):
        return flags
    cut = [placement for placement in parameter.placements if placement.is_shard()]
    if len(cut) > 1 or any(type(placement) is not Shard for placement in cut):
        raise UserError("FSDP2 placements", str(parameter.placements), "dense blocks need one sharded dimension")
    if not cut or cut[0].dim != dim:  # type: ignore[attr-defined]
        return flags
    along = [Shard(0) if placement.is_shard() else placement for placement in parameter.placements]
    return distribute_tensor(flags, parameter.device_mesh, along).to_local()
