"""The states of shadows, in a file of their own beside the run's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from verl_grad_routing.shadows import told_of
from verl_grad_routing.training.router import Router

STATE_FILE = "grad_routing_compare.pt"


def save_states(routers: Mapping[str, Router], folder: str) -> None:
    """Write every shadow's detector, gate and intervention into a checkpoint folder, whole or not at all."""
    path = Path(folder) / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {
        name: {
            "detector": router.detector.state_dict(),
            "gate": router.gate.state_dict(),
            "intervention": router.intervention.state_dict(),
        }
        for name, router in routers.items()
    }
    torch.save(states, partial := path.with_suffix(".partial"))
    os.replace(partial, path)


def load_states(routers: Mapping[str, Router], folder: str) -> None:
    """Restore ``save_states``; a shadow that the run did not have before starts anew, and says so.

    Raises:
        UserError: A state is another method's.
    """
    path = Path(folder) / STATE_FILE
    states = torch.load(path, weights_only=False) if path.exists() else {}
    for name, router in routers.items():
        if name not in states:
            print(f"grad_routing: shadow {name} has no state in {folder}; it starts anew")
            continue
        with told_of(name):
            router.detector.load_state_dict(states[name]["detector"])
            router.gate.load_state_dict(states[name]["gate"])
            if own := states[name].get("intervention"):
                router.intervention.load_state_dict(own)
