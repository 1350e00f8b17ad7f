"""Which neurons and heads of a decoder are the quarantine, and what every parameter is to the two blocks.

The quarantine of a chosen layer is a set of MLP units (rows of the gate and up projections, columns of the down
projection) and of attention heads (rows of q, k and v, columns of o), as in SGTM (arXiv 2512.05648 §3). Everything
else is deployed; parameters named in ``shared`` belong to neither block and learn from every rollout that teaches.

Pure descriptions: names and numbers, no tensors. A range ``(a, b)`` holds ``a`` and excludes ``b``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest
from verl_grad_routing.routing.dense.expansion import EXPANDED, Expansion, check_padding, new_units

SHARED = (
    "embeddings",  # the token embedding
    "head",  # the output projection onto the vocabulary
    "norms",  # weights of all norms
    "output_biases",  # biases of the down and o projections
    "mlp_projection",  # the down projection, all columns
    "attention_projection",  # the o projection, all columns
    "attention",  # q, k, v and o whole
    "other_layers",  # linear weights of layers without quarantine
)
"""What may be told to learn from everything."""

Range = tuple[int, int]
_NUMBERS = re.compile(r"^\d+(-\d+)?(,\d+(-\d+)?)*$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_ROWS = {"mlp.gate_proj": "units", "mlp.up_proj": "units", "self_attn.q_proj": "heads"}
_ROWS |= {"self_attn.k_proj": "groups", "self_attn.v_proj": "groups"}
_COLUMNS = {"mlp.down_proj": ("units", "mlp_projection"), "self_attn.o_proj": ("heads", "attention_projection")}


@dataclass(frozen=True)
class Shape:
    """What the blocks need to know of a model: counts of layers, MLP units, query heads and key/value groups.

    ``expansion`` is what ``vgr expand`` has added to it, counted in ``units``.
    """

    layers: int
    units: int
    heads: int
    groups: int
    head_size: int
    tied: bool
    expansion: Expansion | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str = "actor_rollout_ref.model.path") -> Shape:
        """From a Hugging Face configuration as a mapping. Raises ``UserError`` for one that does not tell."""
        config = config.get("text_config") or config
        counts = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "hidden_size")
        for key in counts:
            if not isinstance(config.get(key), int):
                raise UserError(where, key, "its configuration does not have that as a number; dense blocks need it")
        layers, units, heads, hidden = (config[key] for key in counts)
        size = config.get("head_dim") or hidden // heads
        groups = config.get("num_key_value_heads") or heads
        tied = bool(config.get("tie_word_embeddings", False))
        return cls(layers, units, heads, groups, size, tied, Expansion.of(config, where))

    @classmethod
    def of_folder(cls, folder: Path) -> Shape:
        """From ``config.json`` in ``folder``."""
        return cls.of(json.loads((folder / "config.json").read_text(encoding="utf-8")), str(folder))


@dataclass(frozen=True)
class UnitWeights:
    """How much chosen units are taken out of the factors on activation gradients, see ``UnitsConfig.weights``.

    Attributes:
        layers: Layers, counted from 0.
        units: MLP units of each.
        heads: Query heads of each.
        weight: At most 1.
    """

    layers: tuple[int, ...]
    units: tuple[int, ...]
    heads: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class UnitsConfig:
    """The quarantine as a configuration says it.

    Each of the first three is a number N (the first N), a list, or text such as ``"0-79,128"``, both ends included.

    Attributes:
        mlp_units: MLP units of every chosen layer; ``None`` or 0 for none; ``"expanded"`` for the new units of a model
            that ``vgr expand`` wrote, in the layers that it chose.
        heads: Query heads of every chosen layer, whole key/value groups; ``None`` or 0 for none.
        layers: Layers, counted from 0; ``None`` for all.
        shared: Names in ``SHARED``: parameters that learn from everything.
        weights: Weights of single units, ``[{layers, mlp_units, heads, weight}]``, ``layers`` by default the
            quarantine's. A factor a on the gradient at such a unit's output becomes ``a + (1 - a) weight``: 1 takes the
            unit out, and where a is 0 the weight is the unit's own factor (Cloud et al., arXiv 2410.04332, eq. 1: alpha
            is of data point, unit and edge), on every route. Units not named have 0. Any unit may be named, of either
            block; where a block's factor is 1, as the quarantine's is while ``off_target`` is, its weights do nothing.
    """

    mlp_units: Any = None
    heads: Any = None
    layers: Any = None
    shared: tuple[str, ...] = ()
    weights: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        weights = () if self.weights is None else self.weights
        if not isinstance(weights, list | tuple) or not all(isinstance(entry, Mapping) for entry in weights):
            raise UserError("weights", self.weights, "give a list: [{mlp_units: 0-9, weight: 0.5}, ...]")
        object.__setattr__(self, "weights", tuple(weights))
        if isinstance(self.shared, str):
            raise UserError("shared", self.shared, f"give a list of names; known: {', '.join(SHARED)}")
        object.__setattr__(self, "shared", tuple(self.shared))
        for name in self.shared:
            if name not in SHARED:
                raise UserError("shared", name, nearest(str(name), list(SHARED)))

    def resolve(self, shape: Shape) -> DenseBlocks:
        """The blocks of a model of that shape.

        Raises:
            UserError: A number out of range or twice, heads that are no whole groups, a quarantine of nothing, of all
                units or heads or of padding, new units of a model without any, or tied embeddings that a mask would
                reach.
        """
        if self.mlp_units == EXPANDED:
            return replace(self, **new_units(shape.expansion, self.layers)).resolve(shape)
        every = tuple(range(shape.layers))
        layers = every if self.layers is None else numbers("layers", self.layers, shape.layers, "layers")
        units = numbers("mlp_units", self.mlp_units, shape.units, "MLP units")
        heads = numbers("heads", self.heads, shape.heads, "query heads")
        if not layers or not (units or heads):
            raise UserError("mlp_units", self.mlp_units, "the quarantine is empty; give units, heads, or both")
        for key, chosen, count in (("mlp_units", units, shape.units), ("heads", heads, shape.heads)):
            if len(chosen) == count:
                raise UserError(key, getattr(self, key), f"these are all {count}; leave the deployed block some")
        _check_groups(self.heads, heads, shape)
        check_padding(shape.expansion, units, layers)
        missing = [name for name in ("embeddings", "head") if name not in self.shared]
        if shape.tied and missing:
            fix = "this model's embedding is its head too: put embeddings and head into shared, or untie them"
            raise UserError("shared", list(self.shared), fix)
        weights = self._weights(shape, layers, {"mlp_units": bool(units), "heads": bool(heads)})
        return DenseBlocks(shape, layers, units, heads, frozenset(self.shared), weights)

    def _weights(self, shape: Shape, layers: tuple[int, ...], present: Mapping[str, bool]) -> tuple[UnitWeights, ...]:
        found, seen = [], set[tuple[int, str, int]]()
        for entry in self.weights:
            for key in entry:
                if key not in ("layers", "mlp_units", "heads", "weight"):
                    raise UserError("weights", key, nearest(str(key), ["layers", "mlp_units", "heads", "weight"]))
            given = entry.get("layers")
            own = layers if given is None else numbers("weights.layers", given, shape.layers, "layers")
            if not set(own) <= set(layers):
                fix = f"units are weighed in layers with a quarantine, {', '.join(map(str, layers))}"
                raise UserError("weights.layers", given, fix)
            units = numbers("weights.mlp_units", entry.get("mlp_units"), shape.units, "MLP units")
            heads = numbers("weights.heads", entry.get("heads"), shape.heads, "query heads")
            weight: Any = entry.get("weight")
            number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
            if not number or weight > 1:
                raise UserError("weights.weight", weight, "give a number of at most 1; 1 takes the unit out")
            if not (units or heads):
                raise UserError(
                    "weights.mlp_units", entry.get("mlp_units"), "it names none; give units, heads, or both"
                )
            for key in ("mlp_units", "heads"):
                if type(entry.get(key)) is int:
                    fix = f'a number would be the first {entry[key]}; name them, as in [{entry[key]}] or "0-9"'
                    raise UserError(f"weights.{key}", entry[key], fix)
                if (units if key == "mlp_units" else heads) and not present[key]:
                    fix = f"the quarantine has no {key}, so their gradients are not weighed; leave them out"
                    raise UserError(f"weights.{key}", entry[key], fix)
            named = {(at, kind, n) for at in own for kind, which in (("unit", units), ("head", heads)) for n in which}
            if named & seen:
                at, kind, n = sorted(named & seen)[0]
                raise UserError("weights", f"{kind} {n} of layer {at}", "it is named twice; give it one weight")
            seen |= named
            found.append(UnitWeights(own, units, heads, float(weight)))
        return tuple(found)


def numbers(key: str, value: Any, count: int, what: str) -> tuple[int, ...]:
    """Sorted numbers below ``count`` from N, a list, or text of ranges. Raises ``UserError``."""
    if value is None:
        return ()
    found: list[int] | None = None
    if type(value) is int and value >= 0:
        found = list(range(value))
    elif isinstance(value, str) and _NUMBERS.match(value.replace(" ", "")):
        found = _of_text(value.replace(" ", ""))
    elif isinstance(value, list | tuple) and all(type(entry) is int for entry in value):
        found = list(value)
    if found is None:
        raise UserError(key, value, f'give a number (the first so many), a list, or ranges as "0-{count - 1}"')
    for number in found:
        if not 0 <= number < count:
            raise UserError(key, value, f"the model has {what} 0 to {count - 1}")
    if len(set(found)) != len(found):
        raise UserError(key, value, "names one twice")
    return tuple(sorted(found))


def _of_text(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _check_groups(given: Any, heads: tuple[int, ...], shape: Shape) -> None:
    """Query heads of one group share their keys and values: a group is in one block or in the other."""
    if shape.heads % shape.groups:
        raise UserError("heads", given, f"{shape.heads} heads do not divide by {shape.groups} key/value groups")
    size = shape.heads // shape.groups
    for group in sorted({head // size for head in heads}):
        members = range(group * size, (group + 1) * size)
        if not set(members) <= set(heads):
            fix = f"heads {members[0]}-{members[-1]} share keys and values; name all of them or none"
            raise UserError("heads", given, fix)


def ranges_of(chosen: Sequence[int], width: int = 1) -> tuple[Range, ...]:
    """Runs of consecutive numbers, each number standing for ``width`` rows or columns."""
    runs: list[list[int]] = []
    for number in sorted(chosen):
        if runs and number == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return tuple((first * width, last * width) for first, last in runs)


@dataclass(frozen=True)
class Role:
    """What a parameter is to the blocks.

    Attributes:
        shared: It learns from everything and belongs to neither block.
        dim: Dimension along which the quarantine's part lies; ``None``: all of it is of one block, or shared.
        ranges: The quarantine's part along ``dim``, whether or not the parameter is shared.
        dead: Padding of an expanded model along ``dead_dim``: zero, of no block, never stepped.
    """

    shared: bool = False
    dim: int | None = None
    ranges: tuple[Range, ...] = ()
    dead_dim: int | None = None
    dead: tuple[Range, ...] = ()


@dataclass(frozen=True)
class DenseBlocks:
    """The quarantine of one model, checked. ``units`` and ``heads`` are the same in every one of ``layers``."""

    shape: Shape
    layers: tuple[int, ...]
    units: tuple[int, ...]
    heads: tuple[int, ...]
    shared: frozenset[str] = field(default_factory=frozenset)
    weights: tuple[UnitWeights, ...] = ()

    def weights_along(self, name: str) -> tuple[float, ...] | None:
        """The weight of every unit whose output the parameter ``name`` reads, a number for each of its columns.

        ``None`` where no unit of it is weighed, or its columns are no units.
        """
        found = _LAYER.search(name.rpartition(".")[0])
        if found is None or found[2] not in _COLUMNS:
            return None
        layer, heads = int(found[1]), _COLUMNS[found[2]][0] == "heads"
        width, count = (self.shape.head_size, self.shape.heads) if heads else (1, self.shape.units)
        weights = [0.0] * (width * count)
        here = [entry for entry in self.weights if layer in entry.layers and (entry.heads if heads else entry.units)]
        for entry in here:
            for first, last in ranges_of(entry.heads if heads else entry.units, width):
                weights[first:last] = [entry.weight] * (last - first)
        return tuple(weights) if here else None

    @property
    def expansion(self) -> Expansion | None:
        """Of an expanded model whose new units are the quarantine's: deployment takes them away. Else ``None``."""
        found = self.shape.expansion
        return found if found is not None and (found.new, found.layers) == (self.units, self.layers) else None

    def role(self, name: str) -> Role:
        """The role of the parameter ``name`` (of the Hugging Face model).

        Raises:
            UserError: It is none of a decoder of Llama's kind.
        """
        module, _, side = name.rpartition(".")
        last = module.rpartition(".")[2]
        if "norm" in last:
            return Role("norms" in self.shared)
        found = _LAYER.search(module)
        if found is not None:
            return self._role_in_layer(name, int(found[1]), found[2], side)
        if last == "embed_tokens":
            return Role("embeddings" in self.shared)
        if last == "lm_head":
            return Role("head" in self.shared)
        raise _unsupported(name)

    def _role_in_layer(self, name: str, layer: int, module: str, side: str) -> Role:
        attention = module.startswith("self_attn.")
        if module in _ROWS:
            ranges, shared = self._ranges(layer, _ROWS[module]), set()
        elif module in _COLUMNS:
            what, projection = _COLUMNS[module]
            ranges, shared = self._ranges(layer, what), {projection}
            if side == "bias":
                return Role(bool(self.shared & {"output_biases", *({"attention"} if attention else ())}))
        else:
            raise _unsupported(name)
        shared |= {"attention"} if attention else set()
        shared |= set() if layer in self.layers else {"other_layers"}
        dim, dead = 0 if module in _ROWS else 1, () if attention else self._dead(layer)
        return Role(bool(self.shared & shared), dim if ranges else None, ranges, dim if dead else None, dead)

    def _dead(self, layer: int) -> tuple[Range, ...]:
        expansion = self.shape.expansion
        return () if expansion is None or layer in expansion.layers else ranges_of(expansion.new)

    def _ranges(self, layer: int, what: str) -> tuple[Range, ...]:
        if layer not in self.layers:
            return ()
        if what == "units":
            return ranges_of(self.units)
        if what == "heads":
            return ranges_of(self.heads, self.shape.head_size)
        size = self.shape.heads // self.shape.groups
        return ranges_of(sorted({head // size for head in self.heads}), self.shape.head_size)

    def as_layout(self) -> dict[str, Any]:
        """As plain JSON values; :meth:`from_layout` reads them."""
        layout = {
            "layers": list(self.layers),
            "mlp_units": list(self.units),
            "heads": list(self.heads),
            "shared": sorted(self.shared),
        }
        if self.weights:  # of training alone
            layout["weights"] = [
                {"layers": list(e.layers), "mlp_units": list(e.units), "heads": list(e.heads), "weight": e.weight}
                for e in self.weights
            ]
        return layout

    @classmethod
    def from_layout(cls, layout: Mapping[str, Any], shape: Shape) -> DenseBlocks:
        """The blocks that :meth:`as_layout` wrote, checked against a model's shape. Raises ``UserError``."""
        weights = tuple(layout.get("weights", ()))
        config = UnitsConfig(layout["mlp_units"], layout["heads"], layout["layers"], layout["shared"], weights)
        return config.resolve(shape)


def _unsupported(name: str) -> UserError:
    fix = "dense blocks know decoders of Llama's kind (gate/up/down and q/k/v/o projections); this one is another"
    return UserError("actor_rollout_ref.model.path", name, fix)
