"""TDGA's projection: what is learned stays in the output directions in which a clean warm-up moved each matrix.

Shapes: O output size (s: this rank's rows of it), r rank of a block's adapter, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from verl_grad_routing.directions.checks import require_choice, require_int
from verl_grad_routing.errors import UserError
from verl_grad_routing.subspaces import WEIGHTINGS, Basis, alphas, load_basis
from verl_grad_routing.subspaces.basis import model_hash
from verl_grad_routing.subspaces.projection import coordinates, restore
from verl_grad_routing.training.hooks import ENGINE_HOOKS, Blocks, EngineHook, local

PREFIX, SIDE_A, SIDE_B = "base_model.model.", ".lora_A.", ".lora_B."


@dataclass(frozen=True, eq=False)
class _Side:
    """A lora_B parameter with this rank's rows of its matrix's subspace."""

    parameter: torch.nn.Parameter
    vectors_sK: Tensor
    alphas_K: Tensor


@ENGINE_HOOKS.register("project_update")
class ProjectUpdate(EngineHook):
    """TDGA (arXiv 2605.25189): G ← U diag(α) Uᵀ G with α_i = σ_i / Σ σ_j, before clipping.

    U and σ come from the singular value decomposition of each matrix's change in a short clean warm-up (``vgr
    warm-up``); the paper restores the weights after it, and so does that command. Only the output side is restricted. A
    low-rank adapter changes W by s B A, whose output side is B's: ∂L/∂B = s G Aᵀ is projected, in both blocks, and A
    learns freely (or is frozen). The KL term's gradient is projected with the rest.

    Adam divides by each entry's own scale and so leaves the subspace again: for U = (2, 1)/√5 and G = (1, 0) its first
    step is along (1, 1). ``project: grad`` is the paper's; ``project: update`` applies the same operator to what the
    optimizer did to B, weight decay included, and stays inside.

    Sharded as FSDP2 shards: each rank holds its rows of U, and all matrices' coordinates (K times r numbers each) are
    summed in one reduction; no matrix is gathered.
    """

    @dataclass(frozen=True)
    class Config:
        basis: str  # file that `vgr warm-up` wrote
        rank: int | None = 5  # directions K of each matrix (paper: 1, 5, 10); null takes all that the file holds
        project: str = "grad"  # grad (the paper's), or update
        weights: str = "singular"  # singular (the paper's), or ones: an orthogonal projection
        lora_a: str = "free"  # free, or frozen: the adapters' input side keeps its initial basis

        def __post_init__(self) -> None:
            if self.rank is not None:
                require_int("rank", self.rank, 1)
            require_choice("project", self.project, ("grad", "update"))
            require_choice("weights", self.weights, tuple(WEIGHTINGS))
            require_choice("lora_a", self.lora_a, ("free", "frozen"))

    config: Config
    plain_lora = True  # a frozen B0 would write outside the subspace

    def check(self, model: str) -> None:
        made_on = load_basis(Path(self.config.basis).expanduser(), self.config.rank).origin.get("model_hash", "")
        if made_on and Path(model).expanduser().is_dir() and made_on != model_hash(Path(model).expanduser()):
            fix = f"made on another model than {model}; run `vgr warm-up` on this one"
            raise UserError("grad_routing.blocks.hooks project_update.basis", self.config.basis, fix)

    def bind(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        basis = load_basis(Path(self.config.basis).expanduser(), self.config.rank)
        self.sides: dict[int, _Side] = {}
        self.inputs: list[torch.nn.Parameter] = []
        for name, parameter in parameters.items():
            if SIDE_A in name:
                self.inputs.append(parameter)
                continue
            self.sides[id(parameter)] = self._side(name, parameter, basis)

    def _side(self, name: str, parameter: torch.nn.Parameter, basis: Basis) -> _Side:
        module = name.removeprefix(PREFIX).split(SIDE_B)[0]
        if module not in basis.subspaces:
            fix = f"the basis has no directions of {module}; run `vgr warm-up` on this model, or train fewer modules"
            raise UserError("grad_routing.blocks.hooks project_update.basis", self.config.basis, fix)
        subspace = basis.subspaces[module]
        if subspace.vectors_OK.shape[0] != parameter.shape[0]:
            fix = f"{module} has {parameter.shape[0]} outputs, its directions {subspace.vectors_OK.shape[0]}"
            raise UserError("grad_routing.blocks.hooks project_update.basis", self.config.basis, f"{fix}; other model")
        vectors_OK = subspace.vectors_OK.to(parameter.device)
        if isinstance(parameter, DTensor):  # every rank read the same file
            placed = distribute_tensor(vectors_OK, parameter.device_mesh, parameter.placements, src_data_rank=None)
            vectors_OK = placed.to_local().clone()
        return _Side(parameter, vectors_OK, alphas(subspace.values_K, self.config.weights).to(parameter.device))

    def transform_gradients(self, blocks: Blocks, recompute: Callable[[], None]) -> None:
        self.metrics = {}
        if self.config.lora_a == "frozen":
            for parameter in self.inputs:
                parameter.grad = None
        if self.config.project == "grad":
            sides = [self.sides[id(p)] for block in blocks.values() for p in block if self._trains(p)]
            gradients = [local(side.parameter.grad) for side in sides]  # type: ignore[arg-type]
            for gradient, projected in zip(gradients, self._projected(sides, gradients), strict=True):
                gradient.copy_(projected)

    def transform_update(self, blocks: Blocks, before: Mapping[str, list[Tensor]]) -> None:
        if self.config.project != "update":
            return
        sides, updates = [], []
        for name, block in blocks.items():
            for parameter, old in zip(block, before[name], strict=True):
                if self._trains(parameter):
                    sides.append(self.sides[id(parameter)])
                    updates.append(local(parameter.detach()) - old)
        for side, update, projected in zip(sides, updates, self._projected(sides, updates), strict=True):
            local(side.parameter.detach()).sub_(update - projected)

    def _trains(self, parameter: torch.nn.Parameter) -> bool:
        return id(parameter) in self.sides and parameter.grad is not None

    def _projected(self, sides: Sequence[_Side], matrices: Sequence[Tensor]) -> list[Tensor]:
        """``U diag(alpha) Uᵀ`` of this rank's rows, and the share of the squared norm that is left as a metric."""
        if not sides:
            return []
        parts = [coordinates(m.float(), side.vectors_sK) for side, m in zip(sides, matrices, strict=True)]
        flat = torch.cat([part.flatten() for part in parts])
        group = _sharding_group(sides[0].parameter)
        if group is not None:
            dist.all_reduce(flat, group=group)
        sums = [chunk.view_as(part) for chunk, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
        projected = [
            restore(total, side.vectors_sK, side.alphas_K).to(matrix.dtype)
            for side, total, matrix in zip(sides, sums, matrices, strict=True)
        ]
        squares = torch.stack([_square_sum(projected), _square_sum(matrices), _square_sum(sums)])
        if group is not None:
            dist.all_reduce(squares[:2], group=group)
        left, whole, inside = squares.tolist()
        self.metrics["share_kept"] = left / whole if whole > 0 else 0.0
        self.metrics["share_inside"] = inside / whole if whole > 0 else 0.0
        return projected


def _square_sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


def _sharding_group(parameter: torch.nn.Parameter) -> dist.ProcessGroup | None:
    """The ranks that together hold one copy of the parameter; ``None`` where each holds all of it."""
    if not isinstance(parameter, DTensor):
        return None
    sharded = [dim for dim, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
    if not sharded:
        return None
    if len(sharded) > 1 or parameter.placements[sharded[0]] != Shard(0):
        raise UserError("actor.fsdp_config", parameter.placements, "shard adapters by rows, over one dimension")
    return parameter.device_mesh.get_group(sharded[0])
