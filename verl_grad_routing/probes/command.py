"""From a model's folder and labelled rollouts to a fitted probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verl_grad_routing.chat import Switches, load_tokenizer
from verl_grad_routing.detectors.probe_file import ORIGINS, LinearProbe
from verl_grad_routing.directions import layers_at_depth
from verl_grad_routing.directions.checks import require_choice
from verl_grad_routing.errors import UserError
from verl_grad_routing.probes.activations import pooled_activations
from verl_grad_routing.probes.fit import FitSettings, fit_probe
from verl_grad_routing.probes.rollouts import data_hash, load_rollouts
from verl_grad_routing.subspaces.basis import model_hash


def fit_on_rollouts(
    model: Path,
    rollouts: Path,
    label: str,
    origin: str,
    layers: tuple[int, ...],
    position: str,
    settings: FitSettings,
    chat: Switches | None = None,
) -> LinearProbe:
    """Read the rollouts' activations under ``model`` and fit; no ``layers`` are those at 60-75% of the depth.

    Raises:
        UserError: No model there, a layer it does not have, or what ``load_rollouts`` and ``fit_probe`` refuse.
    """
    import torch
    from transformers import AutoModelForCausalLM

    require_choice("--origin", origin, ORIGINS)
    if not (model / "config.json").is_file():
        raise UserError("MODEL", str(model), "no config.json there; give a Hugging Face model's folder")
    shape = json.loads((model / "config.json").read_text())
    depth = shape.get("num_hidden_layers") or shape.get("text_config", {}).get("num_hidden_layers")
    chosen = tuple(sorted(set(layers))) or layers_at_depth(depth)
    if depth is not None and not 1 <= chosen[0] <= chosen[-1] <= depth:
        raise UserError("--layer", list(chosen), f"the model has layers 1 to {depth}")
    rows = load_rollouts(rollouts, label, load_tokenizer(model, chat))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return fit_probe(
        pooled_activations(loaded.to(device).eval(), rows, chosen, position),
        [row.unwanted for row in rows],
        [row.prompt for row in rows],
        settings,
        layers=chosen,
        position=position,
        origin=origin,
        data_hash=data_hash(rows),
        model_hash=model_hash(model),
    )
