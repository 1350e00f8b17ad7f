"""A basis: for every matrix of a model, orthonormal output directions and how much each of them mattered.

Shapes: O output size of a matrix, K directions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from verl_grad_routing.errors import UserError

FORMAT = "verl-grad-routing-basis-1"


@dataclass(frozen=True, eq=False)
class Subspace:
    """The output subspace of one matrix.

    Attributes:
        vectors_OK: Orthonormal columns, float32, in order of falling singular value.
        values_K: Singular values, float32, positive.
    """

    vectors_OK: Tensor
    values_K: Tensor

    def __post_init__(self) -> None:
        if self.vectors_OK.dim() != 2 or self.values_K.shape != self.vectors_OK.shape[1:]:
            shapes = tuple(self.vectors_OK.shape), tuple(self.values_K.shape)
            raise UserError("basis", shapes, "give columns [O, K] and one singular value for each")
        if not (bool(torch.isfinite(self.vectors_OK).all()) and bool((self.values_K > 0).all())):
            fix = "directions must be finite and singular values positive; was the matrix trained at all?"
            raise UserError("basis", self.values_K.tolist(), fix)

    @property
    def rank(self) -> int:
        return self.values_K.shape[0]


@dataclass(frozen=True)
class Basis:
    """Subspaces by the name of the linear module in the base model, e.g. ``model.layers.0.self_attn.q_proj``.

    Attributes:
        subspaces: Module name -> subspace.
        origin: Where it comes from, plain strings: the base model, its hash, the data's hash.
    """

    subspaces: Mapping[str, Subspace]
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Directions that every matrix has."""
        return min(subspace.rank for subspace in self.subspaces.values())


def save_basis(basis: Basis, path: Path) -> None:
    """Write one safetensors file, whole or not at all."""
    tensors = {}
    for name, subspace in basis.subspaces.items():
        tensors[f"{name}.vectors"] = subspace.vectors_OK.clone().contiguous()
        tensors[f"{name}.values"] = subspace.values_K.clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": FORMAT, **basis.origin})
    partial.replace(path)


def load_basis(path: Path, rank: int | None = None) -> Basis:
    """Read ``save_basis``, the first ``rank`` directions of each matrix (all of them by default).

    Raises:
        UserError: No such file, another kind of file, fewer directions than asked for, or none asked for.
    """
    if rank is not None and rank < 1:
        raise UserError("rank", rank, "ask for at least 1 direction")
    if not path.is_file():
        raise UserError("basis", str(path), "no such file; make one: vgr warm-up MODEL --pairs FILE --to FILE")
    try:
        with safe_open(path, framework="pt") as file:
            origin = dict(file.metadata() or {})
            if origin.pop("format", None) != FORMAT:
                raise UserError("basis", str(path), "not a basis; make one with `vgr warm-up`")
            names = sorted(key.removesuffix(".values") for key in file.keys() if key.endswith(".values"))  # noqa: SIM118
            subspaces = {n: Subspace(file.get_tensor(f"{n}.vectors"), file.get_tensor(f"{n}.values")) for n in names}
    except SafetensorError as error:
        raise UserError("basis", str(path), f"not a safetensors file ({error})") from None
    if rank is None:
        return Basis(subspaces, origin)
    for name, subspace in subspaces.items():
        if rank > subspace.rank:
            fix = f"{path} holds {subspace.rank} directions of {name}; make it with a larger --rank, or ask for less"
            raise UserError("rank", rank, fix)
    cut = {n: Subspace(s.vectors_OK[:, :rank].contiguous(), s.values_K[:rank]) for n, s in subspaces.items()}
    return Basis(cut, origin)


def model_hash(folder: Path) -> str:
    """Tells one checkpoint from another without reading all of it: names, sizes and both ends of its weight files."""
    digest = hashlib.sha256()
    end = 1 << 16
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(end))
            file.seek(max(0, size - end))
            digest.update(file.read(end))
    return digest.hexdigest()
