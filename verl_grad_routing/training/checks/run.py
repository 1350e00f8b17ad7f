"""A whole configuration of verl, with what has been parsed of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from verl_grad_routing.config import GradRoutingConfig, Methods, build_methods, parse
from verl_grad_routing.training.checks.model_shape import model_shape, shape_number

MISSING = "???"


def get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key, or ``default``."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


class Run:
    """A configuration with what has been parsed of it."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.settings: GradRoutingConfig = parse(get(config, "grad_routing", {}))
        self.methods: Methods = build_methods(self.settings)

    def get(self, key: str, default: Any = None) -> Any:
        return get(self.config, key, default)

    @cached_property
    def shape(self) -> dict[str, Any]:
        """The model's configuration; empty where only verl's workers can read it. Raises ``UserError``."""
        return model_shape(str(self.get("actor_rollout_ref.model.path")))

    def shape_number(self, name: str) -> int | None:
        return shape_number(self.shape, name)

    @property
    def routed(self) -> bool:
        return self.settings.blocks.enabled

    @property
    def reads_activations(self) -> bool:
        return self.routed and self.methods.detector.needs_directions

    @property
    def reads_fingerprints(self) -> bool:
        return self.routed and self.methods.detector.needs_fingerprints
