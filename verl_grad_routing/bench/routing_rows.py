"""The rows of ``vgr bench routing``: what is measured, against what, how both are set up, and the bound.

All run the embedded environment's model and batch (128 rollouts, see ``bench.step``). Adapter rows are one
``update_actor`` with the blocks and the routing table of a preset against two blocks unrouted (of the same form, where
that is another one), rows of the base model's own units one against stock verl's update of every parameter (of the same
expanded model, where it is one), and ``persona_grad``'s scores are against one forward and backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verl_grad_routing.bench.gradient_scores import forward_backward, scores
from verl_grad_routing.bench.step import ROLLOUTS, Bench, build_engine, make_batch, make_loss, update_actor
from verl_grad_routing.config import BLOCKS, SHARED
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions import INTERVENTIONS
from verl_grad_routing.routing import DEFAULT, STRICT, Contrast, Route, RoutingTable, save_contrast
from verl_grad_routing.training.masks import TOKEN_ROUTE, TOKEN_WEIGHT

Work = Callable[[], object]
ADAPTER_BOUND, DENSE_BOUND, SCORES_BOUND = 1.03, 1.05, 1.1
# SGTM's small model: some units and a head of every layer, embeddings and norms learning from all.
UNITS = {"mlp_units": 64, "heads": 1, "shared": ["embeddings", "head", "norms"]}
CLOUD_UNITS = {"mlp_units": "0-79", "shared": ["embeddings", "head"]}
NEW_UNITS = 64


def _adam(beta: float, groups: Sequence[str]) -> dict[str, Any]:
    """AdamW(.9, beta) with decay .1 of these groups, as all of the papers' codes have."""
    return {f"betas_{group}": [0.9, beta] for group in groups} | {f"weight_decay_{group}": 0.1 for group in groups}


# What presets set of how blocks are optimised.
TO_START = {**_adam(0.99, BLOCKS), "decay_to_start": True}
STRICT_OPTIM = {**_adam(0.99, BLOCKS), "clip_jointly": True}
SGTM_OPTIM = {**_adam(0.95, (*BLOCKS, SHARED)), "freeze_inactive": False}
CLOUD_OPTIM = {"clip_jointly": True, "freeze_inactive": False}
ERA_OPTIM = {**_adam(0.95, (*BLOCKS, SHARED)), "clip_jointly": False}  # the rest is cloud's
RANKS = {"deployed_rank": 8, "quarantine_rank": 8}
SHARES = {Route.ROUTE: 0.5, Route.ABSORB: 0.25, Route.KEEP: 0.25}
"""Routes of the routed batch: all three kernels' paths are taken."""


@dataclass(frozen=True)
class Row:
    """One measurement: ``routed`` and ``plain`` set up one update each in a folder that holds the model."""

    against: str
    bound: float
    routed: Callable[[Path], Work]
    plain: Callable[[Path], Work]


ROWS: dict[str, Row] = {}


def register_row(name: str, row: Row) -> None:
    """Add a row. Raises ``UserError`` when the name is taken."""
    if ROWS.setdefault(name, row) is not row:
        raise UserError("benchmark row", name, "already registered; pick another name")


def adapter_update(
    blocks: dict[str, Any], table: RoutingTable = DEFAULT, routed: bool = True, tokens: bool = False
) -> Callable[[Path], Work]:
    """An update of two adapter blocks with these settings, over mixed routes (of tokens) or absorbing everything."""

    def make(folder: Path) -> Work:
        settings = dict(blocks)
        if "contrast" in settings:
            settings["contrast"] = str(_made_up_contrast(folder))
        return _update(build_engine(folder, {**RANKS, **settings}), table, routed, tokens)

    return make


def dense_update(
    intervention: dict[str, Any], blocks: dict[str, Any], model: Callable[[Path], Path] = Path, weighted: bool = False
) -> Callable[[Path], Work]:
    """An update of two blocks of the base model itself, over mixed routes and as this intervention treats them."""
    table = INTERVENTIONS.build(intervention, "benchmark row").table
    blocks = {"kind": "dense", **blocks}
    return lambda folder: _update(build_engine(model(folder), blocks, lora_rank=0), table, True, weighted=weighted)


def stock_update(model: Callable[[Path], Path] = Path) -> Callable[[Path], Work]:
    """Stock verl's update of every parameter."""
    return lambda folder: _update(build_engine(model(folder), None, lora_rank=0), DEFAULT, routed=False)


def expanded(folder: Path) -> Path:
    """The model with new MLP units in every layer, made once."""
    from verl_grad_routing.deploy.expansion import Expand, expand

    wide = folder / "expanded"
    if not wide.exists():
        expand(Expand(folder, NEW_UNITS), wide)
    return wide


def _update(engine: Any, table: RoutingTable, routed: bool, tokens: bool = False, weighted: bool = False) -> Work:
    batch, loss = make_batch(kl=True), make_loss(kl=True)
    routes = _mixed(ROLLOUTS) if routed else torch.full((ROLLOUTS,), int(Route.ABSORB))
    if tokens:
        lengths = [len(row) for row in batch["response_mask"].unbind()]
        batch[TOKEN_ROUTE] = _jagged(_mixed(sum(lengths)).split(lengths))
    if weighted:
        batch[TOKEN_WEIGHT] = _jagged([torch.rand(len(row)) for row in batch["input_ids"].unbind()])
    return lambda: update_actor(engine, batch, routes, table, loss)


def _mixed(count: int) -> torch.Tensor:
    routes = torch.tensor([int(route) for route in SHARES])
    counts = torch.tensor([round(count * share) for share in SHARES.values()])
    return routes.repeat_interleave(counts)[torch.randperm(count)]


def _jagged(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def gradient_scores(folder: Path) -> Work:
    """Detector ``persona_grad``'s scores of all rollouts."""
    bench = Bench(folder, kl=False, joined=True)
    assert torch.isfinite(scores(bench)).all()  # and the bases are made, which happens once in a run
    return lambda: scores(bench)


def one_pass(folder: Path) -> Work:
    """One forward and backward pass over the same rollouts, both blocks' gradients included."""
    bench = Bench(folder, kl=False, joined=True)
    return lambda: forward_backward(bench)


def _made_up_contrast(folder: Path) -> Path:
    """Differences of ten pairs for every linear layer: the cost of an update does not depend on what they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from verl_grad_routing.warm_up.command import linear_modules

    path = folder / "contrast.safetensors"
    if not path.exists():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        sizes = {name: model.get_submodule(name).in_features for name in linear_modules(folder)}
        save_contrast(Contrast({name: torch.randn(10, size) + 1 for name, size in sizes.items()}), path)  # type: ignore[arg-type]
    return path


_VANILLA = adapter_update({}, routed=False)
for _name, _blocks, _table in (
    ("persona", {}, DEFAULT),
    ("strict", {"optim": STRICT_OPTIM}, STRICT),
    ("pissa", {"init": "pissa_split", "optim": TO_START}, DEFAULT),
    ("corda", {"init": "corda", "contrast": "", "optim": TO_START}, DEFAULT),
    ("scorda", {"init": "scorda", "contrast": "", "optim": TO_START}, DEFAULT),
    ("decay_to_start", {"optim": TO_START}, DEFAULT),
):
    register_row(_name, Row("vanilla_2r", ADAPTER_BOUND, adapter_update(_blocks, _table), _VANILLA))
register_row("persona_token", Row("vanilla_2r", ADAPTER_BOUND, adapter_update({}, tokens=True), _VANILLA))
for _form in ("two_sided", "antipasto"):
    _blocks = {"init": "pissa_split", "form": _form, "optim": TO_START}
    _unrouted = adapter_update(_blocks, routed=False)
    register_row(_form, Row(f"{_form} unrouted", ADAPTER_BOUND, adapter_update(_blocks), _unrouted))
CLOUD = {"name": "cloud", "alpha": -5e-8}
ERA = {"name": "cloud", "alpha": -0.75}
_NO_LIMITS = {"clip_norm_deployed": math.inf, "clip_norm_quarantine": math.inf}
for _name, _intervention, _blocks, _model, _weighted in (
    ("sgtm", {"name": "sgtm"}, {"units": UNITS, "optim": SGTM_OPTIM, **_NO_LIMITS}, Path, False),
    ("cloud", CLOUD, {"units": CLOUD_UNITS, "optim": CLOUD_OPTIM}, Path, False),
    ("cloud, token weights", CLOUD, {"units": CLOUD_UNITS, "optim": CLOUD_OPTIM}, Path, True),
    (
        "era",
        ERA,
        {"units": {**CLOUD_UNITS, "mlp_units": "expanded"}, "optim": {**CLOUD_OPTIM, **ERA_OPTIM}, **_NO_LIMITS},
        expanded,
        False,
    ),
):
    _routed = dense_update(_intervention, _blocks, _model, _weighted)
    register_row(_name, Row("full parameters", DENSE_BOUND, _routed, stock_update(_model)))
register_row("persona_grad", Row("one pass", SCORES_BOUND, gradient_scores, one_pass))
