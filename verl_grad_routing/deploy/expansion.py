"""Expand and contract of Expand-Route-Ablate: an ordinary model with more MLP units, and the original one of it.

Cloud et al., arXiv 2410.04332, the TinyStories experiment; ``expand_model`` and ``contract_model`` of their code
(kxcloud/gradient-routing).
"""

# transformers' models are typed as plain modules here.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_grad_routing.deploy.artefact import copy_beside, write_model
from verl_grad_routing.deploy.checkpoint import read_json
from verl_grad_routing.deploy.models import load_model, saved_dtype
from verl_grad_routing.deploy.verify import compare, largest_difference, logits_on, probe_tokens
from verl_grad_routing.envs.manifest import replacing
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.dense import DenseBlocks, Expansion, Shape, narrowed, widened
from verl_grad_routing.routing.dense.expansion import KEY, unit_dim
from verl_grad_routing.routing.dense.units import numbers

OUT_SIDES = ("zero", "random")


@dataclass(frozen=True)
class Expand:
    """Settings of an expansion.

    Attributes:
        model: Folder of a Hugging Face model; it is not changed.
        mlp_units: New units of every chosen layer (64 in the paper).
        layers: Layers that get them, counted from 0, as ``"0-4,7"``; ``None`` for all. The others are padded.
        out_side: Columns of down of the new units: ``zero``, so that the model computes what it did, or ``random`` as
            in the paper's code, which trains from scratch.
        std: Standard deviation of what is drawn; ``None``: of each matrix its own root mean square. The paper's code
            draws with 0.8 / sqrt(width), the default of TransformerLens.
        seed: Of the draws.
    """

    model: Path
    mlp_units: int = 64
    layers: str | None = None
    out_side: str = "zero"
    std: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mlp_units < 1:
            raise UserError("--mlp-units", self.mlp_units, "give at least 1")
        if self.out_side not in OUT_SIDES:
            raise UserError("--out-side", self.out_side, f"give {' or '.join(OUT_SIDES)}")
        if self.std is not None and not (math.isfinite(self.std) and self.std > 0):
            raise UserError("--std", self.std, "give a positive number, or leave it out for each matrix's own")

    def resolve(self) -> Expansion:
        """Checked against the model's configuration. Raises ``UserError``."""
        if not (self.model / "config.json").is_file():
            raise UserError("MODEL", str(self.model), "no config.json there; give a Hugging Face model's folder")
        config = read_json(self.model / "config.json")
        found = Expansion.of(config, str(self.model))
        if found is not None:
            fix = f"has {found.units} new units already; expand the model that it was made from, by as many as you want"
            raise UserError("MODEL", str(self.model), fix)
        for key in ("text_config", "quantization_config"):
            if config.get(key) is not None:
                raise UserError("MODEL", str(self.model), f"has a {key}; only plain decoders' weights can be expanded")
        shape = Shape.of(config, str(self.model))
        every = tuple(range(shape.layers))
        layers = every if self.layers is None else numbers("--layers", self.layers, shape.layers, "layers")
        return Expansion(shape.units, self.mlp_units, layers, self.out_side, self.std, self.seed)


@dataclass(frozen=True)
class Expanded:
    """What :func:`expand` wrote: the record, and the largest difference of a logit from the original's."""

    folder: Path
    expansion: Expansion
    difference: float

    def lines(self) -> list[str]:
        """For a terminal."""
        own = self.expansion
        layers = f"layers {', '.join(map(str, own.layers))}"
        return [
            f"{self.folder}: intermediate size {own.original} + {own.units} = {own.original + own.units}",
            f"units {own.new[0]} to {own.new[-1]} are new in {layers}; in other layers they are padding and stay zero",
            f"max abs logit difference from the original model {self.difference:.3g}, in float32 on random tokens",
        ]


def expand(settings: Expand, to: Path) -> Expanded:
    """Write the expanded model into the new folder ``to``, with the original's tokenizer, for transformers and vLLM.

    Raises:
        UserError: No model there, one of another architecture or expanded before, bad settings, or (with
            ``out_side=zero``) a result that does not compute what the original does.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError("--to", str(to), "is there already; name a new or empty folder")
    expansion = settings.resolve()
    path, dtype = str(settings.model), saved_dtype(str(settings.model))
    model = load_model(path)
    _check_architecture(model, expansion, path)
    probes = probe_tokens(model)
    before = logits_on(model, probes)
    model = load_model(path, dtype)
    generator = torch.Generator().manual_seed(expansion.seed)
    _resize(model, lambda name, tensor: widened(name, tensor, expansion, generator))
    model.config.intermediate_size = expansion.original + expansion.units
    setattr(model.config, KEY, expansion.as_record())
    with replacing(to) as folder:
        after = logits_on(write_model(folder, model, dtype), probes)
        if expansion.out_side == "zero":
            compare(before, after)
        copy_beside(settings.model, folder)
    return Expanded(to, expansion, largest_difference(before, after))


def contract(model: Any, expansion: Expansion) -> None:
    """Take new units and padding away, in place: a model of the original size that knows nothing of an expansion."""
    _resize(model, lambda name, tensor: narrowed(name, tensor, expansion))
    model.config.intermediate_size = expansion.original
    delattr(model.config, KEY)


def _resize(model: Any, change: Callable[[str, Tensor], Tensor]) -> None:
    for name, module in model.named_modules():
        for own, parameter in list(module._parameters.items()):
            if parameter is None or unit_dim(f"{name}.{own}") is None:
                continue
            setattr(module, own, nn.Parameter(change(f"{name}.{own}", parameter.data), requires_grad=False))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


def _check_architecture(model: Any, expansion: Expansion, path: str) -> None:
    """Every layer has gate, up and down of the size that the configuration says, and nothing is of another kind."""
    shape = Shape.of(model.config.to_dict(), path)
    blocks = DenseBlocks(shape, expansion.layers, (), ())
    found: dict[tuple[int, str], Any] = {}
    for name, parameter in model.named_parameters():
        try:
            blocks.role(name)
        except UserError as error:
            raise UserError("MODEL", path, f"{error.value}: {error.fix}") from None
        at = unit_dim(name)
        if at is not None:
            found[at[0], name.rpartition("mlp.")[2]] = parameter.shape[at[1]]
    for layer in range(shape.layers):
        for part in ("gate_proj", "up_proj", "down_proj"):
            size = found.get((layer, f"{part}.weight"))
            if size != shape.units:
                fix = f"layer {layer} has {size or 'no'} units in mlp.{part}, its configuration {shape.units}"
                raise UserError("MODEL", path, f"{fix}; only decoders of Llama's kind can be expanded")
