"""Which rows and columns are the quarantine, and the optimizer's views of them."""

from __future__ import annotations

import pytest
import torch

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.dense import BlockParts, DenseBlocks, Role, Shape, UnitsConfig, ablated

SHAPE = Shape(layers=4, units=200, heads=8, groups=2, head_size=3, tied=False)


def blocks(**settings) -> DenseBlocks:
    return UnitsConfig(**settings).resolve(SHAPE)


@pytest.mark.parametrize(
    ("given", "ranges"),
    [(80, [(0, 80)]), ("0-79", [(0, 80)]), ("5,7-8, 100", [(5, 6), (7, 9), (100, 101)]), ([3, 1, 2], [(1, 4)])],
)
def test_both_ends_of_a_range_are_in_it(given, ranges):
    """kxcloud/gradient-routing ablates ``0:max(dims)`` and leaves its last unit in place."""
    found = blocks(mlp_units=given)
    assert list(found.role("model.layers.3.mlp.gate_proj.weight").ranges) == ranges
    down = torch.ones(5, 200)
    gone = ablated("model.layers.3.mlp.down_proj.weight", down, found)
    assert gone.sum() == 5 * (200 - sum(last - first for first, last in ranges)) and down.all()


def test_grouped_heads():
    found = blocks(heads="4-7", layers=[1])
    attention = "model.layers.1.self_attn"
    assert found.role(f"{attention}.q_proj.weight") == Role(False, 0, ((12, 24),))
    assert found.role(f"{attention}.k_proj.bias") == Role(False, 0, ((3, 6),))
    assert found.role(f"{attention}.o_proj.weight") == Role(False, 1, ((12, 24),))
    assert found.role(f"{attention}.o_proj.bias") == Role()
    assert found.role("model.layers.0.self_attn.q_proj.weight") == Role()
    with pytest.raises(UserError, match="heads 0-3 share keys"):
        blocks(heads="3-6")


def test_layout_comes_back():
    found = blocks(mlp_units="1-3,9", heads="0-3", layers=2, shared=["norms", "attention"])
    assert DenseBlocks.from_layout(found.as_layout(), SHAPE) == found
    weighed = blocks(
        mlp_units=3, heads="0-3", layers="1-2", weights=[{"heads": "2", "mlp_units": "0-1", "weight": 0.25}]
    )
    assert DenseBlocks.from_layout(weighed.as_layout(), SHAPE) == weighed != blocks(mlp_units=3, heads=4, layers="1-2")


def test_weights_of_units_are_a_number_for_each_column():
    weights = [{"mlp_units": "1,9-10", "weight": 0.5}, {"layers": [2], "heads": "1", "weight": -2}]
    found = blocks(mlp_units=3, heads="4-7", layers="1-2", weights=weights)
    mlp = found.weights_along("model.layers.1.mlp.down_proj.weight")
    assert mlp is not None and [n for n, w in enumerate(mlp) if w] == [1, 9, 10] and len(mlp) == 200 and max(mlp) == 0.5
    heads = found.weights_along("model.layers.2.self_attn.o_proj.weight")
    assert heads == (0,) * 3 + (-2.0,) * 3 + (0,) * 18
    for name in ("layers.1.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight", "layers.1.mlp.up_proj.weight"):
        assert found.weights_along(f"model.{name}") is None
    assert found.weights_along("model.embed_tokens.weight") is None


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"weight": 0.5}, "weights.mlp_units=None: it names none"),
        ({"mlp_units": "1"}, "weights.weight=None: give a number of at most 1"),
        ({"mlp_units": "1", "weight": 1.5}, "weights.weight=1.5: give a number of at most 1"),
        ({"mlp_units": "1", "weight": float("nan")}, "weights.weight=nan"),
        ({"mlp_units": "200", "weight": 0.5}, "weights.mlp_units='200': the model has MLP units 0 to 199"),
        ({"mlp_units": "1", "layers": "0", "weight": 0.5}, "weights.layers='0': .*layers with a quarantine, 1, 2"),
        ({"heads": [1], "weight": 0.5}, r"weights.heads=\[1\]: the quarantine has no heads"),
        ({"mlp_units": 7, "weight": 0.5}, "weights.mlp_units=7: a number would be the first 7"),
        ({"unit": 1, "weight": 0.5}, "weights='unit'"),
    ],
)
def test_bad_weights_of_units(entry, told):
    with pytest.raises(UserError, match=told):
        blocks(mlp_units=3, layers="1-2", weights=[entry])


def test_a_unit_has_one_weight():
    entries = [{"mlp_units": "4-5", "weight": 0.5}, {"mlp_units": "4", "layers": "2", "weight": 0.5}]
    with pytest.raises(UserError, match=r"unit 4 of layer 2.*named twice"):
        blocks(mlp_units=3, layers="1-2", weights=entries)
    with pytest.raises(UserError, match="give a list"):
        blocks(mlp_units=3, weights={"mlp_units": "1", "weight": 0.5})
    with pytest.raises(UserError, match="give a list"):
        blocks(mlp_units=3, weights=3)
    assert blocks(mlp_units=3, weights=None).weights == ()
    with pytest.raises(UserError, match="the quarantine has no heads"):
        blocks(mlp_units=3, heads=[], weights=[{"heads": [1], "weight": 0.5}])


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.gate_up_proj", "transformer.h.0.mlp.c_fc.weight", "x"])
def test_another_architecture_is_named(name):
    with pytest.raises(UserError, match="Llama's kind"):
        blocks(mlp_units=1).role(name)


def test_a_block_without_gradient_keeps_values_moments_and_count():
    """AdamW with lr .1, betas (.9, .95), decay .1, p = 1 and one gradient of 1, then a step without mass: .89 stays.

    With zeroed gradients, as in SGTM's default optimizer, it would go on to .8132352.
    """
    weight = torch.nn.Parameter(torch.ones(4, 3))
    parts = BlockParts({"w": weight}, lambda _: Role(False, 0, ((1, 3),)))
    assert [tuple(p.shape) for p in parts.blocks["quarantine"]] == [(2, 3)]
    adam = torch.optim.AdamW(
        [{"params": p} for p in parts.blocks.values()], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1
    )
    weight.grad = torch.ones_like(weight)

    def step(*still: str) -> None:
        parts.bind()
        for block in still:
            for part in parts.blocks[block]:
                part.grad = None
        adam.step()
        parts.release()

    step()
    assert torch.allclose(weight.detach(), torch.full((4, 3), 0.89))
    weight.grad = torch.zeros_like(weight)
    step("deployed")
    expected = torch.full((4, 3), 0.89)
    expected[1:3] = 0.8132352
    assert torch.allclose(weight.detach(), expected, atol=1e-6)
    counts = {block: {int(adam.state[p]["step"]) for p in ps} for block, ps in parts.blocks.items()}
    assert counts == {"deployed": {1}, "quarantine": {2}}


def test_columns_are_views_and_norms_are_of_the_parts():
    weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    weight.grad = torch.ones_like(weight)
    parts = BlockParts({"w": weight}, lambda _: Role(False, 1, ((3, 4),)))
    parts.bind()
    (quarantine,) = parts.blocks["quarantine"]
    assert parts.norm([quarantine.grad]) == pytest.approx(3**0.5)
    assert parts.norm([p.grad for p in parts.blocks["deployed"]]) == pytest.approx(3.0)
    quarantine.detach().zero_()
    assert not weight[:, 3].any() and weight[:, :3].sum() == 45
    parts.release()
    assert not parts.blocks["quarantine"][0].numel()
