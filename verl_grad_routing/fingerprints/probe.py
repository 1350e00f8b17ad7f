"""The frozen probe: where it sits, and its down-projections, drawn from a seed.

Legend: ``r`` the probe's rank, ``L`` decoder layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import streams

KEY = "grad_routing.detector"


@dataclass(frozen=True)
class GradientProbe:
    """A LoRA adapter that is drawn, never trained and never stored: all of it follows from these numbers.

    Attributes:
        layers: Decoder layers that carry it, counted from 1.
        targets: Names of the linear layers in them.
        rank: r.
        alpha: LoRA's alpha; the scaling is alpha / r.
        dim: Length of a fingerprint.
        seed: Of the down-projections and of the random projection.
    """

    layers: tuple[int, ...]
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    rank: int = 32
    alpha: float = 64.0
    dim: int = 1024
    seed: int = 0

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def down_projection(self, name: str, d_in: int, device: torch.device | str = "cpu") -> Tensor:
        """A of one module, float32 [r, d_in]: uniform in ±1 / sqrt(d_in), PEFT's own initialisation.

        Args:
            name: The module's name as ``probed_modules`` has it.
        """
        drawn = streams.uniform(streams.key_of("probe", self.seed, name), self.rank * d_in, device)
        return ((2 * drawn - 1) * d_in**-0.5).float().view(self.rank, d_in)

    def projection_key(self, name: str) -> int:
        """Key of the module's rows of the random projection."""
        return streams.key_of("projection", self.seed, name)

    @property
    def hash(self) -> str:
        """Of everything that decides a fingerprint beside the model, the generator's own first words included."""
        settings = {**asdict(self), "alpha": float(self.alpha)}
        drawn = streams.words(streams.key_of("hash", self.seed), 0, 4).tolist()
        return hashlib.sha256(json.dumps([settings, drawn], sort_keys=True).encode()).hexdigest()[:16]


class Placed(Protocol):
    """Anything that says which linear layers it sits on."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def targets(self) -> tuple[str, ...]: ...


def probed_modules(layers: Sequence[nn.Module], probe: Placed) -> dict[str, nn.Module]:
    """The probe's linear layers by name, ``<layer>.<path in the layer>``, whatever wraps the model.

    Args:
        layers: All decoder layers, in order.

    Raises:
        UserError: The model has no such layer, or a layer none of the targets.
    """
    found: dict[str, nn.Module] = {}
    for number in probe.layers:
        if not 1 <= number <= len(layers):
            raise UserError(f"{KEY}.layers", number, f"the model has layers 1 to {len(layers)}")
        inner = {name: module for name, module in layers[number - 1].named_modules() if hasattr(module, "in_features")}
        chosen = {name: m for name, m in inner.items() if name.rpartition(".")[2] in probe.targets}
        if not chosen:
            have = sorted({name.rpartition(".")[2] for name in inner if "lora_" not in name} - {"base_layer"})
            raise UserError(f"{KEY}.targets", list(probe.targets), f"layer {number} has {', '.join(have)}")
        found |= {f"{number}.{name}": module for name, module in chosen.items()}
    return found


def smallest_cosine_layers(cosines_BL: Tensor, count: int) -> tuple[int, ...]:
    """The ``count`` layers that turn the residual stream most, counted from 1, in the model's order.

    Layer l's number is the mean over rollouts of the mean over response tokens of ``cos(h_{l-1}, h_l)`` (GRIFT,
    arXiv 2604.16242). The smallest are taken; of equal ones the earlier.

    Args:
        cosines_BL: Per rollout and layer, already averaged over response tokens.
    """
    layers = cosines_BL.shape[1]
    if count > layers:
        raise UserError(f"{KEY}.num_layers", count, f"the model has {layers} layers")
    means_L = cosines_BL.double().mean(0)
    if not torch.isfinite(means_L).all():
        raise UserError(KEY, means_L.tolist(), "cosines of adjacent layers must be finite; look at the activations")
    return tuple(sorted((torch.argsort(means_L, stable=True)[:count] + 1).tolist()))


def require_same_probe(now: Mapping[str, Any], before: Mapping[str, Any], source: str) -> None:
    """Refuse a probe that differs from ``before``: its fingerprints lie in another space. Raises ``UserError``."""
    for field, value in before.items():
        if now.get(field) != value:
            key = "probe_seed" if field == "seed" else field
            fix = f"{source} with {value!r}, and another probe's fingerprints cannot be compared; set the same"
            raise UserError(f"{KEY}.{key}", now.get(field), fix)
