"""New MLP units of an expanded model: how they start, that they are the quarantine, and that padding stays dead.

Method: Expand-Route-Ablate, Cloud et al., arXiv 2410.04332; weights on gradients as ``α h + (1 - α) sg(h)`` there.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.routing.dense.reference import LAYERS, UNITS, draw_rows, make_model, masks_of, packed, row_loss
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions import INTERVENTIONS
from verl_grad_routing.routing import activation_gradients
from verl_grad_routing.routing.dense import (
    EXPANDED,
    BlockParts,
    DenseBlocks,
    Expansion,
    Role,
    Shape,
    UnitsConfig,
    ablated,
    install_blocks,
    narrowed,
    widened,
)
from verl_grad_routing.routing.dense.expansion import KEY

NEW, CHOSEN, PADDED = 5, (0, 2), 1
ON = (1, 1)


def expansion(**settings: Any) -> Expansion:
    return Expansion(**{"original": UNITS, "units": NEW, "layers": CHOSEN, **settings})


def expanded(model: Any, record: Expansion, seed: int = 0) -> Any:
    wide, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        module, _, own = name.rpartition(".")
        wide.get_submodule(module)._parameters[own] = nn.Parameter(widened(name, p.data, record, generator))
    wide.config.intermediate_size += record.units
    setattr(wide.config, KEY, record.as_record())
    return wide


def blocks_of(model: Any, **settings: Any) -> DenseBlocks:
    return UnitsConfig(**{"mlp_units": EXPANDED, **settings}).resolve(Shape.of(model.config.to_dict()))


class TestStart:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
    def test_contracted_it_is_the_original_bit_for_bit(self, family, dtype):
        model, record = make_model(family=family).to(dtype), expansion(out_side="random")
        wide = expanded(model, record)
        changed = 0
        for (name, p), (_, q) in zip(model.named_parameters(), wide.named_parameters(), strict=True):
            back = narrowed(name, q.data, record)
            assert torch.equal(back, p.data) and back.dtype == dtype and back.is_contiguous()
            changed += q.shape != p.shape
        assert changed == LAYERS * (5 if family == "llama" else 3)  # gate, up and down, llama's with two biases

    def test_the_model_computes_what_it_did(self):
        model, rows = make_model(), draw_rows([(ON, ON)] * 3)
        plain = model(**packed(rows), use_cache=False).logits
        same, other = (
            expanded(model, expansion(out_side=side))(**packed(rows), use_cache=False).logits
            for side in ("zero", "random")
        )
        assert (same - plain).abs().max() < 1e-13 and (other - plain).abs().max() > 0.1

    def test_a_new_unit_is_as_large_as_an_old_one(self):
        old = 3 * torch.randn(400, 300, generator=torch.Generator().manual_seed(1))
        record = Expansion(400, 200, (0,), "random")
        generator = torch.Generator().manual_seed(2)
        gate = widened("model.layers.0.mlp.gate_proj.weight", old, record, generator)
        down = widened("model.layers.0.mlp.down_proj.weight", old.t(), record, generator)
        assert (gate.shape, down.shape) == ((600, 300), (300, 600))
        for new in (gate[400:], down[:, 400:]):
            assert float(new.std()) == pytest.approx(3, rel=0.02) and abs(float(new.mean())) < 0.05
        given = widened("model.layers.0.mlp.up_proj.weight", old, Expansion(400, 200, (0,), std=0.5), generator)
        assert float(given[400:].std()) == pytest.approx(0.5, rel=0.02)

    def test_what_is_zero(self):
        wide = expanded(make_model(), expansion())
        state = dict(wide.named_parameters())
        for layer in range(LAYERS):
            mlp = f"model.layers.{layer}.mlp"
            assert not state[f"{mlp}.down_proj.weight"][:, UNITS:].any()
            assert bool(state[f"{mlp}.gate_proj.weight"][UNITS:].any()) == (layer in CHOSEN)
            assert not state[f"{mlp}.up_proj.bias"][UNITS:].any() and state[f"{mlp}.up_proj.bias"][:UNITS].all()

    def test_draws_are_the_seeds(self):
        models = [expanded(make_model(), expansion(), seed).state_dict() for seed in (0, 0, 1)]
        name = "model.layers.2.mlp.up_proj.weight"
        assert torch.equal(models[0][name], models[1][name]) and not torch.equal(models[0][name], models[2][name])


def era_reference(model: Any, rows: Any) -> dict[str, torch.Tensor]:
    """Every rollout alone, by plain autograd, the masks written onto the chosen layers' hidden units."""
    new = torch.zeros(UNITS + NEW, dtype=torch.float64)
    new[UNITS:] = 1
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        factor = (1 - new) * row.alpha[0] + new * row.alpha[1]

        def weigh(_module, inputs, factor=factor):
            return (factor * inputs[0] + (1 - factor) * inputs[0].detach(),)

        downs = [model.get_submodule(f"model.layers.{layer}.mlp.down_proj") for layer in CHOSEN]
        hooks = [down.register_forward_pre_hook(weigh) for down in downs]
        own = torch.autograd.grad(
            row_loss(model(row.tokens[None], use_cache=False).logits[0], row), list(model.parameters())
        )
        for hook in hooks:
            hook.remove()
        for total, gradient in zip(totals.values(), own, strict=True):
            total += gradient
    return totals


def routed_gradients(model: Any, rows: Any, **settings: Any) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    context = install_blocks(model, blocks_of(model, **settings))
    context.set_all(**masks_of(rows))
    parts = model(**packed(rows), use_cache=False).logits[0].split([len(row.tokens) for row in rows])
    sum(row_loss(part, row) for part, row in zip(parts, rows, strict=True)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


class TestRouting:
    @pytest.mark.parametrize(
        "settings", [{"alpha": -0.75}, {"alpha": -0.75, "off_target": 0.0}, {"alpha": 0.0, "off_target": 0.5}], ids=str
    )
    def test_gradients_are_the_papers(self, settings):
        """Flagged: alpha at original units, 1 at new ones. Others: 1 and off_target, trusted ones too."""
        table = INTERVENTIONS.build({"name": "cloud", **settings}, "test").table
        off = settings.get("off_target", 1.0)
        assert activation_gradients(torch.tensor([0, 1, 2]), table).tolist() == [
            [1, off],
            [1, off],
            [settings["alpha"], 1],
        ]
        masks = [(ON, ON, table.masks(route).activation_gradient) for route in (2, 1, 2, 0)]
        model, rows = expanded(make_model(), expansion(out_side="random")), draw_rows(masks)
        expected, actual = era_reference(model, rows), routed_gradients(model, rows)
        for name, value in expected.items():
            assert (actual[name] - value).abs().max() <= 1e-11 * max(1.0, float(value.abs().max())), name
        plain = era_reference(model, [type(r)(r.tokens, r.weights, r.gate, r.update, (1.0, 1.0)) for r in rows])
        name = "model.layers.0.mlp.gate_proj.weight"
        assert (plain[name] - expected[name]).abs().max() > 0.1  # the masks are seen

    def test_padding_has_no_gradient_at_all(self):
        model = expanded(make_model(), expansion(out_side="random"))
        rows = draw_rows([(ON, ON, (-0.75, 1)), (ON, ON), ((1, 0), (1, 0))])
        gradients = routed_gradients(model, rows)
        mlp = f"model.layers.{PADDED}.mlp"
        for own in ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"):
            assert not gradients[f"{mlp}.{own}"][UNITS:].any() and gradients[f"{mlp}.{own}"][:UNITS].any()
        down = gradients[f"{mlp}.down_proj.weight"]
        assert not down[:, UNITS:].any() and down[:, :UNITS].any()

    def test_new_units_start_to_learn_from_the_side_that_is_zero(self):
        """As an adapter's: the first step moves their columns of down alone, the next one everything."""
        gradients = routed_gradients(expanded(make_model(), expansion()), draw_rows([(ON, ON, (-0.75, 1))]))
        mlp = "model.layers.0.mlp"
        assert gradients[f"{mlp}.down_proj.weight"][:, UNITS:].abs().min() > 0
        assert not gradients[f"{mlp}.gate_proj.weight"][UNITS:].any()


class TestBlocks:
    def test_new_units_are_the_quarantine_and_padding_is_in_no_block(self):
        found = blocks_of(expanded(make_model(), expansion()), shared=["norms"])
        assert (found.layers, found.units, found.heads) == (CHOSEN, tuple(range(UNITS, UNITS + NEW)), ())
        run = ((UNITS, UNITS + NEW),)
        assert found.role("model.layers.2.mlp.up_proj.bias") == Role(False, 0, run)
        assert found.role("model.layers.1.mlp.up_proj.bias") == Role(False, None, (), 0, run)
        assert found.role("model.layers.1.mlp.down_proj.weight") == Role(False, None, (), 1, run)
        assert found.role("model.layers.1.mlp.down_proj.bias") == Role()
        assert found.role("model.layers.1.self_attn.o_proj.weight") == Role()
        assert found.expansion == expansion()
        assert DenseBlocks.from_layout(found.as_layout(), found.shape) == found

    @pytest.mark.parametrize("shared", [(), ("other_layers", "mlp_projection")])
    def test_the_optimizer_never_holds_padding(self, shared):
        model = expanded(make_model(), expansion(out_side="random"))
        blocks = blocks_of(model, shared=shared)
        parts = BlockParts(dict(model.named_parameters()), blocks.role)
        parts.bind()
        held = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        owners = {id(p): name for name, p in model.named_parameters()}
        for piece in parts.pieces:
            held[owners[id(piece.parameter)]].narrow(piece.dim, piece.run[0], piece.run[1] - piece.run[0]).add_(1)
        for name, counts in held.items():
            expected = torch.ones_like(counts)
            if f"layers.{PADDED}.mlp" in name and not name.endswith("down_proj.bias"):
                expected.narrow(int("down_proj" in name), UNITS, NEW).zero_()
            assert torch.equal(counts, expected), name

    def test_old_units_can_still_be_chosen(self):
        """Another method's quarantine in an expanded model: padding stays out of both blocks, nothing is contracted."""
        found = blocks_of(expanded(make_model(), expansion()), mlp_units=3)
        run = ((UNITS, UNITS + NEW),)
        assert found.role("model.layers.1.mlp.down_proj.weight") == Role(False, 1, ((0, 3),), 1, run)
        assert found.expansion is None
        wide = torch.ones(2, UNITS + NEW)
        assert ablated("model.layers.1.mlp.down_proj.weight", wide, found).sum() == 2 * (UNITS + NEW - 3)

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"layers": [0]}, r"layers=\[0\]: leave it null.*\[0, 2\]"),
            ({"mlp_units": "12-14"}, r"mlp_units=.*padding in layer 1.*expanded"),
        ],
    )
    def test_bad_settings(self, settings, told):
        with pytest.raises(UserError, match=told):
            blocks_of(expanded(make_model(), expansion()), **settings)

    def test_a_model_without_new_units(self):
        with pytest.raises(UserError, match=r"mlp_units='expanded': the model has no new units.*vgr expand MODEL"):
            blocks_of(make_model())

    @pytest.mark.parametrize(
        "record",
        [{"original": 12}, {**expansion().as_record(), "units": 4}, {**expansion().as_record(), "layers": [3]}, 7],
        ids=str,
    )
    def test_a_record_of_another_model(self, record):
        model = expanded(make_model(), expansion())
        with pytest.raises(UserError, match=rf"config:{KEY}=.*expand"):
            Shape.of({**model.config.to_dict(), KEY: record}, "config")
