"""A model that has been given new MLP units: the expand of Expand-Route-Ablate, as its ``config.json`` records it.

A Hugging Face configuration has one intermediate size for all layers, so every layer gets the new rows and columns
behind its own. In the chosen layers they are *new units*, in the others *padding*: zero in gate, up and down. Padding
never learns. With ``g = u = 0`` a unit's output ``act(g) u`` is zero, and with it the gradient of its column of down;
that column is zero, and with it the gradient of its output, hence of its rows of gate and up. Decay of zero is zero.

Pure descriptions: names and numbers, no tensors. The method: Cloud et al., arXiv 2410.04332.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from verl_grad_routing.errors import UserError

KEY = "grad_routing_expansion"
"""The key in ``config.json``."""

EXPANDED = "expanded"
"""What ``mlp_units`` says for: the new units, as the model's configuration records them."""

_UNIT_DIMS = {"gate_proj.weight": 0, "gate_proj.bias": 0, "up_proj.weight": 0, "up_proj.bias": 0, "down_proj.weight": 1}
_MLP = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.(\w+\.\w+)$")


@dataclass(frozen=True)
class Expansion:
    """What was added to a model.

    Attributes:
        original: MLP units of every layer before.
        units: MLP units that every layer was given.
        layers: Layers whose new ones are units; in the others they are padding.
        out_side: How the new units' columns of down started: ``zero`` or ``random``.
        std: Standard deviation of what was drawn; ``None``: of each matrix its own.
        seed: Of the draws.
    """

    original: int
    units: int
    layers: tuple[int, ...]
    out_side: str = "zero"
    std: float | None = None
    seed: int = 0

    @property
    def new(self) -> tuple[int, ...]:
        """Numbers of the new units, or of the padding."""
        return tuple(range(self.original, self.original + self.units))

    def as_record(self) -> dict[str, Any]:
        """As JSON values for ``config.json``; :meth:`of` reads them."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Expansion | None:
        """The record in a Hugging Face configuration as a mapping; ``None`` for a model that was not expanded.

        Raises:
            UserError: The record is not one, or not of a model of this size.
        """
        record = config.get(KEY)
        if record is None:
            return None
        try:
            found = cls(**{**record, "layers": tuple(record["layers"])})
            size, layers = found.original + found.units, range(config["num_hidden_layers"])
        except (TypeError, KeyError) as error:
            raise UserError(f"{where}:{KEY}", record, f"unreadable ({error}); expand the model again") from None
        if config.get("intermediate_size") != size or not set(found.layers) <= set(layers):
            fix = f"not of this model, whose intermediate size is {config.get('intermediate_size')}; expand it again"
            raise UserError(f"{where}:{KEY}", record, fix)
        return found


def unit_dim(name: str) -> tuple[int, int] | None:
    """``(layer, dimension along which MLP units lie)`` of the parameter ``name``; ``None`` where there are none."""
    found = _MLP.search(name)
    dim = None if found is None else _UNIT_DIMS.get(found[2])
    return None if found is None or dim is None else (int(found[1]), dim)


def new_units(expansion: Expansion | None, given_layers: Any) -> dict[str, Any]:
    """What ``mlp_units: expanded`` stands for, as settings of ``UnitsConfig``. Raises ``UserError``."""
    if expansion is None:
        fix = "the model has no new units; set actor_rollout_ref.model.path to what `vgr expand MODEL --to DIR` wrote"
        raise UserError("mlp_units", EXPANDED, fix)
    if given_layers is not None:
        fix = f"leave it null: the expanded model says which layers have new units, {list(expansion.layers)}"
        raise UserError("layers", given_layers, fix)
    return {"mlp_units": list(expansion.new), "layers": list(expansion.layers)}


def check_padding(expansion: Expansion | None, units: tuple[int, ...], layers: tuple[int, ...]) -> None:
    """Padding is in no block. Raises ``UserError`` where the quarantine names it."""
    if expansion is None or set(units).isdisjoint(expansion.new) or set(layers) <= set(expansion.layers):
        return
    padded = sorted(set(layers) - set(expansion.layers))
    fix = f"units from {expansion.original} on are padding in layer {padded[0]} and never learn; set mlp_units=expanded"
    raise UserError("mlp_units", list(units), fix)
