"""A fitted probe as one safetensors file: weights, threshold, and where all of it comes from.

Shapes: L layers, d hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from verl_grad_routing.errors import UserError

FORMAT = "verl-grad-routing-probe-1"
ORIGINS = ("labels", "monitor", "pairs")
KEY = "grad_routing.detector.probe"


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """``logit = bias + sum_l <h_l, w_l>`` of a rollout's pooled activations, and the logit above which it is unwanted.

    Attributes:
        weights_Ld: float64, for activations as they are (no scaling is left to do).
        bias: Of the logit.
        threshold: Logit that the share ``false_positive_rate`` of the held-out clean rollouts, or less, exceeds.
        layers: Residual stream after these blocks, from 1.
        position: Which tokens are pooled, one of ``directions.POSITIONS``.
        origin: Who labelled the rollouts it was fitted on: ``labels`` (the grader), ``monitor`` or ``pairs``.
        data_hash: SHA-256 (hex) over tokens and labels of the rollouts.
        model_hash: Of the model whose activations it reads (``subspaces.basis.model_hash``).
        report: What is known of it: rows, held-out AUROC, rates at the threshold, settings of the fit.
    """

    weights_Ld: Tensor
    bias: float
    threshold: float
    layers: tuple[int, ...]
    position: str
    origin: str
    data_hash: str
    model_hash: str
    report: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.weights_Ld.ndim != 2 or len(self.weights_Ld) != len(self.layers):
            shapes = tuple(self.weights_Ld.shape), self.layers
            raise UserError(KEY, shapes, "give weights [L, d], one row for each layer")
        if self.origin not in ORIGINS:
            raise UserError("origin", self.origin, f"choose one of {', '.join(ORIGINS)}")

    @property
    def hidden_size(self) -> int:
        return self.weights_Ld.shape[1]

    @property
    def content_hash(self) -> str:
        """Of everything that decides a score."""
        settings = [self.bias, self.threshold, list(self.layers), self.position]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self.weights_Ld.to(torch.float64).contiguous().numpy().tobytes())
        return digest.hexdigest()


def save_probe(probe: LinearProbe, path: Path) -> None:
    """Write one safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "bias": probe.bias,
        "threshold": probe.threshold,
        "layers": list(probe.layers),
        "position": probe.position,
        "origin": probe.origin,
        "data_hash": probe.data_hash,
        "model_hash": probe.model_hash,
        "report": dict(probe.report),
    }
    partial = path.with_suffix(".partial")
    weights = {"weights": probe.weights_Ld.to(torch.float64).clone().contiguous()}
    save_file(weights, partial, metadata={"format": FORMAT, "probe": json.dumps(facts)})
    partial.replace(path)


def load_probe(path: Path, key: str = KEY) -> LinearProbe:
    """Read ``save_probe``. Raises ``UserError``: no such file, or not a probe."""
    if not path.is_file():
        raise UserError(key, str(path), "no such file; make one: vgr probe fit MODEL ROLLOUTS --to FILE")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise UserError(key, str(path), "not a probe; make one with `vgr probe fit`")
            weights = file.get_tensor("weights")
    except SafetensorError as error:
        raise UserError(key, str(path), f"not a safetensors file ({error})") from None
    facts = json.loads(metadata["probe"])
    return LinearProbe(weights, **{**facts, "layers": tuple(facts["layers"])})
