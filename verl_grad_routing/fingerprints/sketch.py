"""From gradients to fingerprints: a random projection that is generated block by block and never stored.

Legend: ``B`` rollouts, ``P`` entries of a module's gradient, ``F`` length of a fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from verl_grad_routing.fingerprints import streams
from verl_grad_routing.fingerprints.per_sample import Span, per_sample_gradients
from verl_grad_routing.fingerprints.probe import GradientProbe

BLOCK = 1 << 22  # entries of the projection that exist at a time: 16 MiB of float32


def sketch(gradients_BP: Tensor, key: int, dim: int, block: int = BLOCK) -> Tensor:
    """``gradients Mᵀ / sqrt(F)`` with M the ±1 matrix [F, P] of the stream ``key``: [B, F], float32 or float64.

    Linear, so the sketches of modules with different keys may be added: that is the sketch of all of them in one.
    """
    rows, count = max(1, block // dim), gradients_BP.shape[1]
    total_BF = gradients_BP.new_zeros(len(gradients_BP), dim)
    with torch.autocast(gradients_BP.device.type, enabled=False):
        for start in range(0, count, rows):
            part_Bp = gradients_BP[:, start : start + rows]
            signs_pF = streams.signs(key, start, part_Bp.shape[1], dim, gradients_BP.device)
            total_BF += part_Bp @ signs_pF.to(part_Bp.dtype)
    return total_BF * dim**-0.5


class Fingerprints:
    """Consumer of ``GradientTaps`` that adds up the rollouts' sketches, one module at a time.

    Needs memory for one module's gradients of one micro-batch and one block of the projection.

    Args:
        probe: What was drawn.
        spans: Tokens of each rollout of the micro-batch.
    """

    def __init__(self, probe: GradientProbe, spans: Sequence[Span]):
        self.probe, self.spans = probe, spans
        self._total_BF: Tensor | None = None

    def __call__(self, name: str, x_NI: Tensor, delta_NO: Tensor) -> None:
        A_rI = self.probe.down_projection(name, x_NI.shape[1], x_NI.device)
        gradients_BOr = per_sample_gradients(x_NI, delta_NO, A_rI, self.spans, self.probe.scaling)
        part_BF = sketch(gradients_BOr.flatten(1), self.probe.projection_key(name), self.probe.dim)
        self._total_BF = part_BF if self._total_BF is None else self._total_BF + part_BF

    @property
    def sketches_BF(self) -> Tensor:
        """``M g / sqrt(F)`` of every rollout, before normalisation."""
        assert self._total_BF is not None, "no module has brought a gradient"
        return self._total_BF

    @property
    def normalised_BF(self) -> Tensor:
        """Fingerprints: sketches of Euclidean norm 1, zeros for a rollout without a gradient (no response token)."""
        norms_B1 = self.sketches_BF.norm(dim=1, keepdim=True)
        return torch.where(norms_B1 == 0, self.sketches_BF, self.sketches_BF / norms_B1)
