"""The shipped presets, read from ``conf/grad_routing`` without Hydra: what a preset says, and which there are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest

SELF = "_self_"


def preset_names() -> list[str]:
    """Every preset that ships; files that start with an underscore are parts of others."""
    names = [file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml")]
    return sorted(name for name in names if not name.startswith("_"))


def preset_settings(name: str, environment: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The mapping under ``grad_routing`` that ``+grad_routing=name`` gives, interpolations resolved.

    Args:
        name: A preset.
        environment: The mapping ``grad_routing.environment``; entries without a value count as absent.

    Raises:
        UserError: No such preset. Required values that nobody gave are left as ``???``.
    """
    if name not in preset_names():
        raise UserError("preset", name, nearest(name, preset_names()))
    present = {key: value for key, value in (environment or {}).items() if value not in (None, "", (), [])}
    own = _composed(name).grad_routing
    tree = OmegaConf.create({"grad_routing": OmegaConf.merge(own, {"environment": present})})
    settings: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=False)
    return settings["grad_routing"]


def _folder() -> Any:
    return resources.files("verl_grad_routing").joinpath("conf").joinpath("grad_routing")


def _composed(name: str) -> DictConfig:
    """The file ``name`` merged with those of its defaults list, in the list's order, as Hydra does."""
    own = OmegaConf.create(_folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(own, DictConfig)
    merged: Any = OmegaConf.create({})
    for entry in own.pop("defaults", [SELF]):
        merged = OmegaConf.merge(merged, own if entry == SELF else _composed(entry))
    return merged
