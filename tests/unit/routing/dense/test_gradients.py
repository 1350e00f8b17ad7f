"""Every parameter's gradient in a mixed packed batch is the sum of the allowed parts of each rollout's own one."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.unit.routing.dense.reference import (
    CHOSEN,
    WEIGHTS,
    draw_rows,
    expected_gradients,
    make_model,
    masks_of,
    own_gradients,
    packed,
    quarantine_of,
    row_loss,
)
from verl_grad_routing.routing.dense import DenseBlocks, Shape, UnitsConfig, install_blocks
from verl_grad_routing.routing.dense.install import DenseLinear

KEEP, ABSORB, ROUTE = ((1, 0), (1, 0)), ((1, 1), (1, 1)), ((1, 1), (0, 1))
ON = (1, 1)


def blocks(model, *shared: str, weighed: bool = False) -> DenseBlocks:
    weights = tuple(dict(zip(("layers", "mlp_units", "heads", "weight"), entry, strict=True)) for entry in WEIGHTS)
    weights = weights if weighed else ()
    config = UnitsConfig(list(CHOSEN["units"]), "2-3", list(CHOSEN["layers"]), shared, weights)
    return config.resolve(Shape.of(model.config.to_dict()))


def routed_gradients(model, rows, *shared: str, checkpointing: bool = False, weighed: bool = False):
    model = copy.deepcopy(model)
    context = install_blocks(model, blocks(model, *shared, weighed=weighed))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    context.set_all(**masks_of(rows))
    logits = model(**packed(rows), use_cache=False).logits[0]
    parts = logits.split([len(row.tokens) for row in rows])
    sum(row_loss(part, row) for part, row in zip(parts, rows, strict=True)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def agree(actual, expected, tolerance=1e-11):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] is not None, name
        assert (actual[name] - value).abs().max() <= tolerance * max(1.0, float(value.abs().max())), name


SHARED = {
    "embeddings": lambda name: "embed_tokens" in name,
    "head": lambda name: "lm_head" in name,
    "norms": lambda name: "norm" in name,
    "output_biases": lambda name: name.endswith(("down_proj.bias", "o_proj.bias")),
    "mlp_projection": lambda name: name.endswith("down_proj.weight"),
    "attention_projection": lambda name: name.endswith("o_proj.weight"),
    "attention": lambda name: "self_attn" in name,
    "other_layers": lambda name: (
        "layers.1." in name and "norm" not in name and "down_proj.bias" not in name and "o_proj.bias" not in name
    ),
}

CASES = {
    "parameter masking": ([KEEP, ABSORB, ROUTE, ROUTE, KEEP, ABSORB], ()),
    "strict": ([KEEP, (ON, (1, 0)), ROUTE], ()),
    "nothing learns": ([(ON, (0, 0)), ROUTE], ("embeddings", "norms")),
    "weights": ([((1, 0), (0.25, 0)), (ON, (0.5, 0.5)), (ON, (0, 0.75))], ("norms",)),
    "activation masking": ([((0, 1), (0, 1)), ABSORB, KEEP], ("embeddings", "head", "norms", "output_biases")),
    "gradient routing": ([(ON, ON, (0, 1)), ABSORB, KEEP], ()),
    "cloud": ([(ON, ON, (-0.75, 1)), ABSORB, (ON, ON, (-5e-8, 1))], ()),
    **{f"shared {name}": ([KEEP, ABSORB, ROUTE], (name,)) for name in SHARED},
    "no projections": ([KEEP, ABSORB, ROUTE], ("mlp_projection", "attention_projection")),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_allowed_parts_of_each_rollouts_own(case):
    masks, shared = CASES[case]
    model, rows = make_model(), draw_rows(masks)
    expected = expected_gradients(model, rows, lambda name: any(SHARED[key](name) for key in shared))
    agree(routed_gradients(model, rows, *shared), expected)
    assert max(float(value.abs().max()) for value in expected.values()) > 0.1


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_decoders_of_this_kind(family):
    model, rows = make_model(family=family), draw_rows([KEEP, ABSORB, ROUTE, (ON, ON, (-0.5, 1))])
    agree(routed_gradients(model, rows), expected_gradients(model, rows))


def test_checkpointing_changes_nothing():
    model, rows = make_model(), draw_rows([KEEP, ABSORB, ROUTE, (ON, ON, (-0.5, 1))])
    agree(routed_gradients(model, rows, checkpointing=True), expected_gradients(model, rows))


def test_alpha_of_every_token_alone():
    model = make_model()
    plain = draw_rows([ABSORB, ABSORB])
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in plain:
        alpha = torch.rand(len(row.tokens), 2, generator=generator, dtype=torch.float64) * 2 - 1
        rows.append(type(row)(row.tokens, row.weights, row.gate, row.update, alpha))
    agree(routed_gradients(model, rows), expected_gradients(model, rows))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_alpha_of_every_token_and_unit(checkpointing):
    """Some units are half out, some all, some are pushed the other way; gates of other rollouts beside them."""
    model, generator = make_model(), torch.Generator().manual_seed(4)
    rows = draw_rows([ABSORB, KEEP, (ON, ON, (0, 1)), ((0, 1), ON, (-0.75, 0.5))])
    alpha = torch.rand(len(rows[0].tokens), 2, generator=generator, dtype=torch.float64) * 2 - 1
    rows[0] = type(rows[0])(rows[0].tokens, rows[0].weights, rows[0].gate, rows[0].update, alpha)
    expected = expected_gradients(model, rows, weighed=True)
    agree(routed_gradients(model, rows, weighed=True, checkpointing=checkpointing), expected)
    without = expected_gradients(model, rows)
    assert max(float((without[name] - value).abs().max()) for name, value in expected.items()) > 0.1


def test_weights_of_units_change_nothing_where_no_alpha_is_set():
    model, rows = make_model(), draw_rows([KEEP, ABSORB, ROUTE])
    found, plain = (routed_gradients(model, rows, weighed=weighed) for weighed in (True, False))
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_the_reference_tells_the_variants_apart():
    model, rows = make_model(), draw_rows([ABSORB, (ON, ON, (0, 1)), ROUTE])
    expected = expected_gradients(model, rows)
    for other in ([ABSORB, ROUTE, ROUTE], [ABSORB, (ON, ON, (0, 1)), ABSORB], [KEEP, (ON, ON, (0, 1)), ROUTE]):
        wrong = expected_gradients(model, draw_rows(other))
        assert max(float((wrong[name] - value).abs().max()) for name, value in expected.items()) > 0.1


def test_what_is_deployed_moves_by_nothing_when_all_is_flagged():
    rows = draw_rows([ROUTE, ROUTE, ROUTE])
    for name, gradient in routed_gradients(make_model(), rows).items():
        flags = quarantine_of(name, gradient.shape)
        assert torch.equal(gradient * (1 - flags), torch.zeros_like(gradient)), name
        assert not flags.any() or (gradient[flags == 1] != 0).any(), name


def test_update_masks_do_not_touch_the_forward_pass():
    model, rows = make_model().float(), draw_rows([ABSORB, ROUTE, ROUTE])
    inputs = packed(rows)
    inputs["attention_mask"] = inputs["attention_mask"].float()
    plain = model(**inputs, use_cache=False).logits
    context = install_blocks(model, blocks(model))
    assert torch.equal(model(**inputs, use_cache=False).logits, plain)
    masks = masks_of(rows)
    context.set_all(None, masks["update_mask"], masks["activation_gradient"].float() * -0.5, masks["shared_mask"])
    assert torch.equal(model(**inputs, use_cache=False).logits, plain)


def test_ablated_is_the_quarantine_gated_off_everywhere():
    model, rows = make_model(), draw_rows([ABSORB, ROUTE])
    context = install_blocks(model, blocks(model))
    context.set_all(**{**masks_of(rows), "forward_gate": torch.tensor([1.0, 0.0]).expand(1, 1, 2)})
    gated = model(**packed(rows), use_cache=False).logits
    context.clear()
    together = model(**packed(rows), use_cache=False).logits
    context.ablated = True
    assert torch.equal(model(**packed(rows), use_cache=False).logits, gated)
    assert (gated - together).abs().max() > 0.1


def test_a_layer_keeps_its_gated_input_only_where_its_own_will_not_do():
    model, rows = make_model(), draw_rows([KEEP, ROUTE])
    context = install_blocks(model, blocks(model))
    layers = (module for module in model.modules() if isinstance(module, DenseLinear))
    layer = next(layer for layer in layers if layer.weight_role.dim == 1 and layer.weight_role.ranges)
    masks = masks_of(rows)
    x = torch.randn(1, masks["update_mask"].shape[-2], layer.in_features, dtype=torch.float64, requires_grad=True)

    def kept_and_gradient() -> tuple[bool, torch.Tensor]:
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(x)
        (gradient,) = torch.autograd.grad(y.sin().sum(), [layer.weight])
        return any(tensor.data_ptr() == x.data_ptr() for tensor in kept), gradient

    context.set_all(**masks)
    assert kept_and_gradient()[0]
    context.set_all(masks["forward_gate"], None)
    assert not kept_and_gradient()[0]
    _, expected = kept_and_gradient()
    for stale in (masks, {"forward_gate": None, "update_mask": None}):
        context.set_all(**stale)
        context.set(masks["forward_gate"], None)
        kept, gradient = kept_and_gradient()
        assert not kept and torch.equal(gradient, expected)


def test_kept_rollouts_give_the_quarantine_exactly_nothing():
    own = own_gradients(make_model(), draw_rows([KEEP])[0])
    for name, gradient in own.items():
        flags = quarantine_of(name, gradient.shape) == 1
        assert not gradient[flags].any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype):
    """Under autocast the layers compute in its dtype, and gradients come in the parameters'."""
    model, rows = make_model().float(), draw_rows([KEEP, ABSORB, ROUTE])
    context = install_blocks(model, blocks(model))
    context.set_all(**masks_of(rows))
    inputs = packed(rows)
    inputs["attention_mask"] = inputs["attention_mask"].float().clamp(min=-1e30)
    with torch.autocast("cpu", dtype):
        logits = model(**inputs, use_cache=False).logits[0].double()
    parts = logits.split([len(row.tokens) for row in rows])
    sum(row_loss(part, row) for part, row in zip(parts, rows, strict=True)).backward()
    expected = expected_gradients(make_model(), rows)
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
        assert (p.grad.double() - expected[name]).norm() <= 0.15 * expected[name].norm() + 1e-6, name
