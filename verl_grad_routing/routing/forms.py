"""What a block keeps of each layer, and the plain adapter ``(A, B)`` that this means, by name.

``lora`` keeps A and B themselves. The other forms keep something else and say how A and B follow from it; that one
function is what the kernel runs, what is merged and what leaves for the rollout engine and for files. So routing is
exact in every form (each token's part of the gradients of A and B is masked, and the chain rule from there is
linear), and an exported adapter is the trained one.

A part is a tensor of one block in one layer, the parameter ``lora_<part>.<adapter>.weight``; ``A`` and ``B`` are
PEFT's own.

Legend: ``I``, ``O`` input and output size of a layer; ``r`` rank of a block, ``r_d``, ``r_q`` of both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from itertools import chain, zip_longest
from typing import ClassVar

import torch
from torch import Tensor

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.bases import ROW_NORM, BlockWeights, orthonormal

COLUMN_NORM = ROW_NORM
"""Norm of every column of B₀: that of the rows of A, as in the lineage, where both are units."""

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]
Starts = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Parts of the deployed and of the quarantine block."""


class Form(ABC):
    """One form; registered in ``FORMS``. Without state.

    Attributes:
        extra_parts: Parts beside ``A`` and ``B``; the first one tells this form's parts from another's.
        trained: The parts that train; the others are frozen where they start.
        sides: Rank of the plain adapter in units of the block's.
        reads_weight: Whether the start follows from the base weight.
        change: What is zero as long as the adapter is zero, for reports.
    """

    name: ClassVar[str] = ""
    extra_parts: ClassVar[tuple[str, ...]] = ()
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    sides: ClassVar[int] = 1
    reads_weight: ClassVar[bool] = False
    change: ClassVar[str] = "|B|"

    def extra_shapes(self, block: str, rank: int, d_in: int, d_out: int) -> dict[str, Shape]:
        """Shapes of the extra parts of ``block`` (``deployed`` or ``quarantine``)."""
        del block, rank, d_in, d_out
        return {}

    @abstractmethod
    def start(self, basis: BlockWeights, weight_OI: Tensor | None, leads: str = "deployed") -> Starts:
        """Starting values of the deployed and of the quarantine block's parts, float64, for a basis.

        Args:
            weight_OI: The base weight, float64, where ``reads_weight``.
            leads: The block whose row comes first, as the basis dealt them in turn.
        """

    @abstractmethod
    def adapter(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """The plain adapter, ``A [sides · r, I]`` and ``B [O, sides · r]``, differentiable."""

    @abstractmethod
    def reads(self, parts: Parts) -> Tensor:
        """Rows ``[r, I]`` of the bottleneck: what the block reads of a layer's input."""

    def columns(self, parts: Parts) -> Tensor | None:
        """Frozen columns ``[O, r]`` that the block writes with, where it has such."""
        del parts
        return None

    @abstractmethod
    def moved(self, parts: Parts) -> float:
        """Largest magnitude of ``change``; 0: the adapter is zero."""


FORMS: dict[str, Form] = {}


def register_form(name: str):
    """Decorator of a class; raises ``UserError`` when the name is taken."""

    def decorate(cls: type[Form]) -> type[Form]:
        if name in FORMS:
            raise UserError("form", name, "already registered; pick another name")
        cls.name = name
        FORMS[name] = cls()
        return cls

    return decorate


def get_form(name: str) -> Form:
    """The form registered as ``name``; raises ``UserError`` for an unknown one."""
    if not isinstance(name, str):
        raise UserError("form", name, "a block has one form; give one name")
    if name not in FORMS:
        raise UserError("form", name, f"known: {', '.join(FORMS)}")
    return FORMS[name]


def form_of(parts: Collection[str]) -> Form:
    """The form that has parts of these names."""
    for form in FORMS.values():
        if form.extra_parts and form.extra_parts[0] in parts:
            return form
    return FORMS["lora"]


@register_form("lora")
class Lora(Form):
    """Plain LoRA: A and B themselves, B zero at the start."""

    def start(self, basis: BlockWeights, weight_OI: Tensor | None, leads: str = "deployed") -> Starts:
        del weight_OI, leads
        return {"A": basis.A_d, "B": basis.B_d}, {"A": basis.A_q, "B": basis.B_q}

    def adapter(self, parts: Parts) -> tuple[Tensor, Tensor]:
        return parts["A"], parts["B"]

    def reads(self, parts: Parts) -> Tensor:
        return parts["A"]

    def moved(self, parts: Parts) -> float:
        return float(parts["B"].abs().max())


@register_form("two_sided")
class TwoSided(Form):
    """A basis on both sides: ``B A - B₀ A₀`` with frozen A₀, B₀ and trained ``dA = A - A₀``, ``dB = B - B₀``.

    wassname/vGROUT_pub@c067218 (src/vgrout/adapters/lora.py:33-53) computes ``B (A x) - B₀ (A₀ x)``: a small difference
    of large products, of which bfloat16 loses a third or more. The same difference without cancellation is ::

        B A - B₀ A₀  =  B₀ dA + dB (A₀ + dA)  =  [B₀, dB] [dA; A₀ + dA]

    an adapter of rank 2r, exactly zero at the start. Trained are the deltas, in the optimizer's precision, so that its
    weight decay is decay towards the start, as the lineage has it.

    A₀ is the basis. B₀ is what the base weight makes of it: the images ``W A₀ᵀ``, orthonormalised over both blocks in
    the order in which the rows were dealt, times ``COLUMN_NORM``. For ``pissa_split`` these are the left singular
    vectors of W, for ``corda`` those of ``W C^½``, and for ``scorda`` the seed's column is ``unit(W u)`` with the left
    singular vectors after it (pissa.py:42-51, corda.py:45-55, scorda.py:69-86): Gram-Schmidt depends on the spans of
    the first k alone, which W maps into each other. Random bases get the images of random directions; the lineage's
    Gaussian B₀ has columns 4 to 12 times as long as its singular ones.
    """

    extra_parts = ("A0", "B0")
    sides = 2
    reads_weight = True
    change = "|dA|, |dB|"

    def extra_shapes(self, block: str, rank: int, d_in: int, d_out: int) -> dict[str, Shape]:
        return {"A0": (rank, d_in), "B0": (d_out, rank)}

    def start(self, basis: BlockWeights, weight_OI: Tensor | None, leads: str = "deployed") -> Starts:
        """Raises ``UserError``: more directions than outputs, or images that depend on each other."""
        _require_zero_B(self, basis)
        assert weight_OI is not None
        frames = output_frame(basis, weight_OI, leads)

        def block(A0: Tensor, B0: Tensor) -> dict[str, Tensor]:
            return {"A": torch.zeros_like(A0), "B": torch.zeros_like(B0), "A0": A0, "B0": B0}

        return block(basis.A_d, frames[0]), block(basis.A_q, frames[1])

    def adapter(self, parts: Parts) -> tuple[Tensor, Tensor]:
        dA, dB = parts["A"], parts["B"]
        return torch.cat((dA, parts["A0"] + dA)), torch.cat((parts["B0"], dB), dim=1)

    def reads(self, parts: Parts) -> Tensor:
        return parts["A0"] + parts["A"]

    def columns(self, parts: Parts) -> Tensor:
        return parts["B0"]

    def moved(self, parts: Parts) -> float:
        return max(float(parts[side].abs().max()) for side in "AB")


@register_form("antipasto")
class Antipasto(Form):
    """What the base weight does along frozen directions, with a learned gain, read through a learned rotation.

    With unit rows V of the basis, a gain g and a rotation R of a block's r directions::

        dW = (W Vᵀ) diag(tanh g) R V        R = (I + K)⁻¹ (I - K),  K = X - Xᵀ  (Cayley)

    so that along an unrotated direction W acts ``1 + tanh g`` times. g and X train and start at zero, hence dW = 0 and
    R = I; V and W Vᵀ are frozen. The adapter has rank r for any g and X: nothing is approximated on the way out. With
    ``pissa_split``, W Vᵀ is U S and this is the adapter of wassname/vGROUT_pub@c067218
    (src/vgrout/adapters/antipasto.py:43-67,99-138), which takes U, S and V from ``corda``, as its decomposition has
    them and not orthonormal.

    A block trains r + r² numbers a layer, whatever the layer's size, both blocks alike.
    """

    extra_parts = ("gain", "turn")
    trained = frozenset({"gain", "turn"})
    reads_weight = True
    change = "|gain|"
    turned: ClassVar[tuple[str, ...]] = ("deployed", "quarantine")

    def extra_shapes(self, block: str, rank: int, d_in: int, d_out: int) -> dict[str, Shape]:
        return {"gain": (rank,), **({"turn": (rank, rank)} if block in self.turned else {})}

    def start(self, basis: BlockWeights, weight_OI: Tensor | None, leads: str = "deployed") -> Starts:
        del leads
        _require_zero_B(self, basis)
        assert weight_OI is not None
        starts = []
        for block, A in (("deployed", basis.A_d), ("quarantine", basis.A_q)):
            V = A / A.norm(dim=1, keepdim=True)
            shapes = self.extra_shapes(block, len(V), V.shape[1], len(weight_OI))
            zeros = {part: torch.zeros(shape, dtype=V.dtype) for part, shape in shapes.items()}
            starts.append({"A": V, "B": weight_OI @ V.t(), **zeros})
        return starts[0], starts[1]

    def adapter(self, parts: Parts) -> tuple[Tensor, Tensor]:
        with torch.autocast(parts["A"].device.type, enabled=False):
            return self.reads(parts), parts["B"] * parts["gain"].tanh()

    def reads(self, parts: Parts) -> Tensor:
        if "turn" not in parts:
            return parts["A"]
        V, X = parts["A"], parts["turn"]
        with torch.autocast(V.device.type, enabled=False):
            return cayley(X) @ V.to(torch.promote_types(V.dtype, torch.float32))

    def columns(self, parts: Parts) -> Tensor:
        return parts["B"]

    def moved(self, parts: Parts) -> float:
        return float(parts["gain"].abs().max())


@register_form("antipasto_lineage")
class AntipastoLineage(Antipasto):
    """``antipasto`` as the lineage has it: the quarantine rotates, the deployed block has its gains alone."""

    turned = ("quarantine",)


def cayley(X_rr: Tensor) -> Tensor:
    """The rotation ``(I + K)⁻¹ (I - K)`` of ``K = X - Xᵀ``, in float32 at least; ``I + K`` is always invertible."""
    X = X_rr.to(torch.promote_types(X_rr.dtype, torch.float32))
    K, eye = X - X.t(), torch.eye(len(X), dtype=X.dtype, device=X.device)
    return torch.linalg.solve_ex(eye + K, eye - K)[0]  # solve() would wait for the device to look for a failure


def output_frame(basis: BlockWeights, weight_OI: Tensor, leads: str) -> tuple[Tensor, Tensor]:
    """``B₀`` of both blocks, ``[O, r_d]`` and ``[O, r_q]``: see :class:`TwoSided`.

    Raises:
        UserError: More directions than outputs, or an image in the span of those before it.
    """
    r_d, total = len(basis.A_d), len(basis.A_d) + len(basis.A_q)
    if total > len(weight_OI):
        fix = f"two-sided blocks need as many outputs, and a layer has {len(weight_OI)}: lower the ranks, or exclude it"
        raise UserError("deployed_rank + quarantine_rank", total, fix)
    deployed, quarantine = range(r_d), range(r_d, total)
    pair = (deployed, quarantine) if leads == "deployed" else (quarantine, deployed)
    order = [row for row in chain.from_iterable(zip_longest(*pair)) if row is not None]
    images = torch.cat((basis.A_d, basis.A_q))[order] @ weight_OI.t()
    frame = torch.empty_like(images)
    frame[order] = orthonormal(images) * COLUMN_NORM
    return frame[:r_d].t(), frame[r_d:].t()


def _require_zero_B(form: Form, basis: BlockWeights) -> None:
    if bool(basis.B_d.any()) or bool(basis.B_q.any()):
        raise UserError("form", form.name, "needs an init that starts with B = 0; set lora")
