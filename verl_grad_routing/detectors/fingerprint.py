"""Detectors that read gradient fingerprints: which probe, which layers, which rollouts.

Legend: ``B`` rollouts, ``L`` decoder layers, ``F`` length of a fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.base import BatchView, Detector
from verl_grad_routing.directions.checks import as_tuple, require_int, require_number
from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import GradientProbe, smallest_cosine_layers
from verl_grad_routing.fingerprints.probe import KEY, require_same_probe


@dataclass(frozen=True, kw_only=True)
class FingerprintConfig:
    """The frozen probe."""

    layers: tuple[int, ...] | None = None  # decoder layers that carry it, counted from 1; null: chosen by cosine
    num_layers: int = 5  # how many layers are chosen where layers is null
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # linear layers that carry it
    rank: int = 32
    alpha: float = 64.0  # its scaling is alpha / rank; fingerprints have norm 1, so it matters to raw gradients alone
    dim: int = 1024  # length of a fingerprint
    probe_seed: int = 0  # of the probe and its projection: the same for the whole run

    def __post_init__(self) -> None:
        if self.layers is not None:
            layers = as_tuple("layers", self.layers)
            for layer in layers:
                require_int("layers", layer, 1)
            if not layers or len(set(layers)) != len(layers):
                raise UserError("layers", list(layers), "give different layers, at least one, or null")
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        targets = as_tuple("targets", self.targets)
        if not targets or not all(isinstance(target, str) for target in targets):
            raise UserError("targets", list(targets), "give the names of linear layers, as in [q_proj, v_proj]")
        object.__setattr__(self, "targets", targets)
        for field in ("num_layers", "rank", "dim"):
            require_int(field, getattr(self, field), 1)
        require_number("alpha", self.alpha, 0)
        if self.alpha == 0:
            raise UserError("alpha", self.alpha, "give a positive number")
        require_int("probe_seed", self.probe_seed, 0)


class FingerprintDetector(Detector):
    """Reads ``fingerprints_BF``; the trainer asks ``chosen_rows``, and has the layers chosen once where none are given.

    The probe of a run never changes: a state that another probe made is refused.
    """

    needs_fingerprints: ClassVar[bool] = True
    config: FingerprintConfig

    def __init__(self, config: FingerprintConfig):
        super().__init__(config)
        self.layers: tuple[int, ...] | None = config.layers

    def chosen_rows(self, view: BatchView) -> Tensor:
        """Rollouts [B] (bool) whose fingerprints it needs; ``view`` is what it may see, before there are any."""
        return torch.ones(len(view.keys), dtype=torch.bool)

    def resolve_layers(self, num_layers: int) -> tuple[int, ...] | None:
        """The layers in a model of ``num_layers``; ``None`` before the choice. Raises ``UserError``: out of range."""
        if self.layers is not None and max(self.layers) > num_layers:
            raise UserError(f"{KEY}.layers", list(self.layers), f"the model has layers 1 to {num_layers}")
        if self.layers is None and self.config.num_layers > num_layers:
            raise UserError(f"{KEY}.num_layers", self.config.num_layers, f"the model has {num_layers} layers")
        return self.layers

    def choose_layers(self, cosines_BL: Tensor) -> None:
        """Fix the layers, once, by ``smallest_cosine_layers``."""
        if self.layers is None:
            self.layers = smallest_cosine_layers(cosines_BL, self.config.num_layers)

    @property
    def probe(self) -> GradientProbe:
        """The frozen probe. Raises ``UserError`` before its layers are known."""
        if self.layers is None:
            raise UserError(KEY, self.name, "the layers of the probe are not chosen yet; call choose_layers")
        config = self.config
        return GradientProbe(self.layers, config.targets, config.rank, config.alpha, config.dim, config.probe_seed)

    def state_dict(self) -> dict[str, Any]:
        probe = None if self.layers is None else {**asdict(self.probe), "hash": self.probe.hash}
        return {**super().state_dict(), "probe": probe}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``. Raises ``UserError``: another detector's, or fingerprints of another probe."""
        super().load_state_dict(state)
        self.adopt_probe(state["probe"], "the run was started")

    def adopt_probe(self, saved: Mapping[str, Any] | None, source: str) -> None:
        """Take over the layers of a saved probe, if all else of it is ours. Raises ``UserError`` otherwise."""
        if saved is None:
            return
        wanted = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
        drawn = wanted.pop("hash")
        before, self.layers = self.layers, wanted["layers"]
        try:
            require_same_probe({**asdict(self.probe), "layers": before or wanted["layers"]}, wanted, source)
            require_same_probe({"probe hash": self.probe.hash}, {"probe hash": drawn}, source)
        except UserError:
            self.layers = before
            raise
