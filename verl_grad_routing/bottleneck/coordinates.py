"""Every rollout's own bottleneck coordinates of the gradient, from one forward and backward pass over the whole batch.

With a gate c on the bottleneck, ``y = W x + B (c ⊙ A x)``, and a loss that is a sum over rollouts, the gradient of c
that rollout i brings is

    f_i = sum over i's tokens of  (A x_t) ⊙ (Bᵀ delta_t)          [r]

with x the layer's input and delta the gradient of its output: both are there in any backward pass, so no adapter is
needed. It is the identity probe of wassname/vGROUT_pub@c067218 (adapters/lora.py:42-47), and equals the row sums of
``A ⊙ dA`` and the column sums of ``B ⊙ dB`` of an ordinary adapter with these weights and scaling 1.

Legend: ``N`` tokens of a flattened batch, padding included, ``B`` rollouts, ``M`` modules, ``r`` rank,
``D`` directions, ``P`` sides of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from verl_grad_routing.bottleneck.basis import ModuleBasis
from verl_grad_routing.fingerprints.per_sample import Span


def bottleneck_gradients(x_NI: Tensor, delta_NO: Tensor, basis: ModuleBasis, spans: Sequence[Span]) -> Tensor:
    """Each rollout's gradient of the gate, ``[B, r]``, float32 (float64 for float64 inputs).

    The two products run in the inputs' own precision, as an adapter's would; from there on all is float32, the sum over
    tokens first of all.

    Args:
        x_NI: Inputs of the linear layer.
        delta_NO: Gradients of the loss with respect to its outputs.
        basis: Of the layer.
        spans: Tokens of each rollout.
    """
    dtype = torch.float64 if x_NI.dtype == torch.float64 else torch.float32
    with torch.autocast(x_NI.device.type, enabled=False):
        h_Nr = (x_NI @ basis.read_rI.to(x_NI).t()).to(dtype)
        g_Nr = (delta_NO @ basis.write_Or.to(delta_NO)).to(dtype)
        both_Nr = h_Nr.mul_(g_Nr)
        return torch.stack([both_Nr[start:end].sum(0) for start, end in spans])


class KeptCoordinates:
    """Consumer of ``GradientTaps`` that keeps the coordinates themselves: for pairs, which are few.

    Args:
        bases: By module name.
        spans: Tokens of each rollout of the micro-batch.
    """

    def __init__(self, bases: Mapping[str, ModuleBasis], spans: Sequence[Span]):
        self.bases, self.spans = bases, spans
        self._found: dict[str, Tensor] = {}

    def __call__(self, name: str, x_NI: Tensor, delta_NO: Tensor) -> None:
        self._found[name] = bottleneck_gradients(x_NI, delta_NO, self.bases[name], self.spans)

    @property
    def rows(self) -> Tensor:
        """``[B, M * r]``, modules in the order of ``bases``."""
        return torch.stack([self._found[name] for name in self.bases], dim=1).flatten(1)


class ProjectedCoordinates:
    """Consumer of ``GradientTaps`` that projects on directions module by module: D + 1 numbers a rollout, whatever M.

    Args:
        bases: By module name.
        spans: Tokens of each rollout of the micro-batch.
        vectors_DMr: Directions, modules in the order of ``bases``.
        cosine: Divide by both norms.
    """

    def __init__(
        self, bases: Mapping[str, ModuleBasis], spans: Sequence[Span], vectors_DMr: Tensor, cosine: bool = False
    ):
        self.bases, self.spans, self.cosine = bases, spans, cosine
        self.vectors = dict(zip(bases, vectors_DMr.double().unbind(1), strict=True))
        self.norms_D = vectors_DMr.double().flatten(1).norm(dim=1)
        self._dots_BD: Tensor | None = None
        self._squares_B: Tensor | None = None

    def __call__(self, name: str, x_NI: Tensor, delta_NO: Tensor) -> None:
        f_Br = bottleneck_gradients(x_NI, delta_NO, self.bases[name], self.spans).double()
        dots_BD = (f_Br[:, None] * self.vectors[name].to(f_Br.device)).sum(-1)
        squares_B = f_Br.square().sum(-1)
        self._dots_BD = dots_BD if self._dots_BD is None else self._dots_BD + dots_BD
        self._squares_B = squares_B if self._squares_B is None else self._squares_B + squares_B

    @property
    def rows(self) -> Tensor:
        """Scores ``[B, D]``, float64: mean over modules of ``<f_m, v_m>``, or the cosine of all of them together."""
        assert self._dots_BD is not None and self._squares_B is not None, "no module has brought a gradient"
        if not self.cosine:
            return self._dots_BD / len(self.bases)
        return _divided(self._dots_BD, self._squares_B.sqrt(), self.norms_D.to(self._dots_BD.device))


def cosines(coordinates_PMr: Tensor, vectors_DMr: Tensor) -> Tensor:
    """Cosine between all coordinates of a row and all of a direction, ``[P, D]``, float64; 0 for a row of zeros."""
    rows_PX, vectors_DX = coordinates_PMr.double().flatten(1), vectors_DMr.double().flatten(1)
    return _divided(rows_PX @ vectors_DX.t(), rows_PX.norm(dim=1), vectors_DX.norm(dim=1))


def _divided(dots_BD: Tensor, norms_B: Tensor, norms_D: Tensor) -> Tensor:
    scale_BD = norms_B[:, None] * norms_D
    return torch.where(scale_BD == 0, torch.zeros_like(dots_BD), dots_BD / scale_BD)
