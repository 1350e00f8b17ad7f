"""A linear probe on activations, fitted beforehand on labelled rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.activation import KEY, ActivationConfig, ActivationDetector, Reading
from verl_grad_routing.detectors.base import DETECTORS, BatchView, Signal
from verl_grad_routing.detectors.probe_file import LinearProbe, load_probe
from verl_grad_routing.directions.activation import Direction, without_pairs
from verl_grad_routing.errors import UserError


@DETECTORS.register("linear_probe")
class LinearProbeDetector(ActivationDetector):
    """``score = sigmoid(logit - threshold)`` of a probe that ``vgr probe fit`` made: above 0.5 is its verdict.

    The monitor of 'Steering RL training: benchmarking interventions against reward hacking': logistic regression on
    response-mean activations, its threshold at 5% false positives on held-out prompts. Activations are read in verl's
    passes, at the layers and the position of the file; nothing of the batch's facts is read. What it knows, it knows
    from the rollouts that it was fitted on: the file says who labelled those, and ``signal`` is that.
    """

    signal: ClassVar[Signal] = Signal.labels  # of a file that does not say otherwise
    needs_pairs: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True)
    class Config(ActivationConfig):
        probe: str = ""  # required: the file that `vgr probe fit` wrote

        def __post_init__(self) -> None:
            super().__post_init__()
            if not isinstance(self.probe, str) or not self.probe:
                raise UserError("probe", self.probe, "give the file that `vgr probe fit` wrote")
            if self.layers is not None:
                raise UserError("layers", list(self.layers), "leave null: the probe's file says which layers it reads")
            if self.refresh_every:
                raise UserError("refresh_every", self.refresh_every, "set 0: a probe is never fitted again in a run")

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.probe: LinearProbe = load_probe(Path(config.probe).expanduser(), f"{KEY}.probe")
        self.signal = Signal(self.probe.origin)  # type: ignore[misc]

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    @property
    def model_hash(self) -> str:
        """Of the model that it was fitted on."""
        return self.probe.model_hash

    @property
    def position(self) -> str:
        return self.probe.position

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        if max(self.probe.layers) > num_layers:
            fix = f"it reads layer {max(self.probe.layers)}, and the model has layers 1 to {num_layers}"
            raise UserError(f"{KEY}.probe", self.config.probe, fix)
        return self.probe.layers

    def _choose(self, read: Reading) -> Direction:
        if (read.layers, read.hidden_size) != (self.probe.layers, self.probe.hidden_size):
            fix = f"it was fitted on hidden size {self.probe.hidden_size}, and the model has {read.hidden_size}"
            raise UserError(f"{KEY}.probe", self.config.probe, fix)
        # a projection averages over layers, a logit adds them up
        vectors_Ld = self.probe.weights_Ld * len(self.probe.layers)
        return without_pairs(vectors_Ld, self.probe.layers, f"linear_probe {self.probe.content_hash}")

    def score(self, view: BatchView) -> Tensor:
        return torch.sigmoid(super().score(view) + (self.probe.bias - self.probe.threshold))

    def verdicts(self, view: BatchView, scores_B: Tensor) -> tuple[Tensor, Tensor]:
        del view
        return torch.ones_like(scores_B, dtype=torch.bool), scores_B > 0.5

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        saved = state["direction"]
        if saved is not None and saved["kind"] != f"linear_probe {self.probe.content_hash}":
            fix = "the run was started with another probe; restore its file or start a new run"
            raise UserError(f"{KEY}.probe", self.config.probe, fix)
