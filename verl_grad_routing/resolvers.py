"""The arithmetic that presets need in interpolations.

``${vgr.sum:1,2}``, ``${vgr.product:2,16}`` and ``${vgr.adapter_rank:8,8,two_sided}``, the rank of the adapter that two
blocks are for the rollout.
"""

from __future__ import annotations

import math
from typing import Any

from omegaconf import OmegaConf


def register() -> None:
    """Register once per process; configurations are resolved in the driver and in verl's task runner."""
    OmegaConf.register_new_resolver("vgr.sum", lambda *terms: sum(terms), replace=True)
    OmegaConf.register_new_resolver("vgr.product", lambda *factors: math.prod(factors), replace=True)
    OmegaConf.register_new_resolver("vgr.adapter_rank", adapter_rank, replace=True)


def adapter_rank(deployed_rank: int, quarantine_rank: int, form: Any = "lora") -> int:
    """An unknown form counts as plain: the check of the configuration refuses it by its own key."""
    from verl_grad_routing.registry import load_external_methods
    from verl_grad_routing.routing import FORMS  # imports torch

    if form == "lora" or not isinstance(form, str):
        return deployed_rank + quarantine_rank
    if form not in FORMS:
        load_external_methods()
    return (deployed_rank + quarantine_rank) * (FORMS[form].sides if form in FORMS else 1)
