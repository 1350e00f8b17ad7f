"""The arithmetic that presets need in interpolations: ``${vgr.sum:1,2}`` and ``${vgr.product:2,16}``."""

from __future__ import annotations

import math

from omegaconf import OmegaConf


def register() -> None:
    """Register once per process; configurations are resolved in the driver and in verl's task runner."""
    OmegaConf.register_new_resolver("vgr.sum", lambda *terms: sum(terms), replace=True)
    OmegaConf.register_new_resolver("vgr.product", lambda *factors: math.prod(factors), replace=True)
