"""From a training checkpoint to files that PEFT, transformers and vLLM load: the quarantine deleted, and checked.

The names are loaded on first use, so that ``vgr --help`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_grad_routing.deploy.checkpoint import Checkpoint, find_checkpoint
    from verl_grad_routing.deploy.exporter import Exported, export

_HOME = {"Checkpoint": "checkpoint", "find_checkpoint": "checkpoint", "Exported": "exporter", "export": "exporter"}

__all__ = ["Checkpoint", "Exported", "export", "find_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
