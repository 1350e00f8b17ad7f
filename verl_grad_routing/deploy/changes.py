"""The change that a run has made to every matrix so far, as a basis: what ``vgr drift`` compares."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from verl_grad_routing.deploy.checkpoint import find_checkpoint
from verl_grad_routing.deploy.shards import ShardedState
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import join_blocks
from verl_grad_routing.subspaces import Basis
from verl_grad_routing.subspaces.change import leading

_PREFIX, _SIDE_A = "base_model.model.", ".lora_A.weight"


def checkpoint_basis(path: Path, rank: int) -> Basis:
    """Leading left singular vectors of ``s B A``, both blocks together, of every adapted matrix of a checkpoint.

    Args:
        path: A step's folder of a run with blocks.
        rank: Directions of each matrix; at most the blocks' ranks together.

    Raises:
        UserError: No checkpoint with blocks, more directions than the adapter has, or one that has not moved yet.
    """
    checkpoint = find_checkpoint(path)
    layout = checkpoint.layout
    if layout.kind != "adapters":
        raise UserError("CHECKPOINT", str(path), "its blocks are no adapters; a basis is taken from adapters")
    total = layout.rank_of("both")
    if not 1 <= rank <= total:
        raise UserError("--rank", rank, f"the adapter of {path} has rank {total}; ask for 1 to {total} directions")
    joined = join_blocks({name: t for name, t in ShardedState(checkpoint.actor).items() if ".lora_" in name})
    subspaces = {}
    for name, a_rI in joined.items():
        if not name.endswith(_SIDE_A):
            continue
        b_Or: Tensor = joined[name.replace("lora_A", "lora_B")]
        change_OI = layout.scaling * b_Or.double() @ a_rI.double()
        if not bool(change_OI.any()):
            raise UserError("CHECKPOINT", str(path), f"{name} has not moved yet; take a later step")
        subspaces[name.removeprefix(_PREFIX).removesuffix(_SIDE_A)] = leading(change_OI, rank)
    return Basis(subspaces, {"checkpoint": str(path)})
