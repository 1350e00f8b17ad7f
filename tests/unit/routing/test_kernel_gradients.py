"""The kernel against a float64 account of every rollout alone (reference.py), over mixed batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.unit.routing.reference import (
    Problem,
    apply_layer,
    gradients,
    make_problem,
    mix,
    reference_gradients,
    relative_error,
    rollout_loss,
)
from verl_grad_routing.routing import (
    ACTIVATION_MASKING,
    DEFAULT,
    STRICT,
    block_masks,
    expand_to_padded,
    expand_to_tokens,
    routed_linear,
    routed_lora,
)

TABLES = {"default": DEFAULT, "strict": STRICT, "activation_masking": ACTIVATION_MASKING}
RANKS = [(3, 3), (1, 1), (2, 5), (4, 1)]


def routes_and_masks(problem: Problem, seed: int, table=DEFAULT, weighted: bool = False):
    generator = torch.Generator().manual_seed(seed)
    routes = torch.randint(0, 3, (len(problem.rollouts),), generator=generator)
    weights = torch.rand(len(routes), generator=generator) if weighted else None
    return tuple(mask.double() for mask in block_masks(routes, table, weights))


def packed_backward(problem: Problem, gate_B2, update_B2, apply=apply_layer, shape: str = "TD"):
    """Forward and backward over all rollouts packed behind one another; returns the packed outputs."""
    gate, update = (expand_to_tokens(mask, problem.lengths) for mask in (gate_B2, update_B2))
    x = torch.cat(problem.rollouts)
    if shape == "1TD":
        x, gate, update = x[None], gate[None], update[None]
    hidden = apply(problem, 0, x, gate, update)
    pieces = [mix(piece) for piece in hidden.reshape(-1, hidden.shape[-1]).split(problem.lengths)]
    mixed = torch.cat(pieces)
    out = apply(problem, 1, mixed[None] if shape == "1TD" else mixed, gate, update)
    outputs = out.reshape(-1, out.shape[-1]).split(problem.lengths)
    sum(rollout_loss(o, t) for o, t in zip(outputs, problem.targets, strict=True)).backward()
    return out


def padded_backward(problem: Problem, gate_B2, update_B2):
    """The same in padded rows ``[B, S, d]``; padding carries no loss."""
    length = max(problem.lengths)
    gate, update = (expand_to_padded(mask, length) for mask in (gate_B2, update_B2))
    x = nn.utils.rnn.pad_sequence(problem.rollouts, batch_first=True, padding_value=0.3)
    hidden = apply_layer(problem, 0, x, gate, update)
    mixed = torch.stack([mix(row) for row in hidden])  # causal, so padding behind a rollout does not reach it
    out = apply_layer(problem, 1, mixed, gate, update)
    losses = [rollout_loss(o[:n], t) for o, t, n in zip(out, problem.targets, problem.lengths, strict=True)]
    sum(losses).backward()


def assert_input_gradients(problem: Problem, expected, tolerance: float = 1e-12):
    for rollout, want in zip(problem.rollouts, expected, strict=True):
        assert torch.allclose(rollout.grad, want, rtol=tolerance, atol=tolerance * max(1, float(want.abs().max())))


@pytest.mark.parametrize("layout", ["TD", "1TD", "padded"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_sum_of_allowed_rollout_gradients(layout, ranks, table, weighted):
    for seed in range(3):
        problem = make_problem(seed, ranks, bias=seed % 2 == 0)
        masks = routes_and_masks(problem, seed + 100, TABLES[table], weighted)
        expected, expected_inputs = reference_gradients(problem, *masks)
        if layout == "padded":
            padded_backward(problem, *masks)
        else:
            packed_backward(problem, *masks, shape=layout)
        assert relative_error(gradients(problem), expected) < 1e-12
        assert_input_gradients(problem, expected_inputs)


def test_masks_may_differ_between_tokens_of_a_rollout():
    problem = make_problem(3, rows=1, ranks=(2, 3))
    generator = torch.Generator().manual_seed(5)
    (weight, bias), p = problem.bases[0], problem.adapters[0]
    x, g = problem.rollouts[0], torch.randn(problem.lengths[0], weight.shape[0], generator=generator).double()
    gate, update = (torch.rand(len(x), 2, generator=generator).double() for _ in range(2))
    routed_linear(x, weight, bias, p["A_d"], p["A_q"], p["B_d"], p["B_q"], gate, update, 0.7).backward(g)
    for block, column in (("d", 0), ("q", 1)):
        A, B = p[f"A_{block}"], p[f"B_{block}"]
        expected_A = sum(
            update[t, column] * gate[t, column] * 0.7 * torch.outer(B.t() @ g[t], x[t]) for t in range(len(x))
        )
        expected_B = sum(update[t, column] * gate[t, column] * 0.7 * torch.outer(g[t], A @ x[t]) for t in range(len(x)))
        assert torch.allclose(A.grad, expected_A, atol=1e-12) and torch.allclose(B.grad, expected_B, atol=1e-12)


def test_single_mask_row_broadcasts():
    problem, spelled_out = make_problem(1), make_problem(1)
    gate, update = torch.tensor([0.5, 1.0]).double(), torch.tensor([1.0, 0.25]).double()
    rows = len(problem.rollouts)
    for p, masks in ((problem, (gate, update)), (spelled_out, (gate.expand(rows, 2), update.expand(rows, 2)))):
        x = torch.stack([rollout[0] for rollout in p.rollouts])
        apply_layer(p, 0, x, *masks).sin().sum().backward()
    for name, p in problem.adapters[0].items():
        assert torch.equal(p.grad, spelled_out.adapters[0][name].grad)


def test_two_micro_batches_add_up_to_one():
    whole, parts = make_problem(7), make_problem(7)
    masks = routes_and_masks(whole, 8)
    packed_backward(whole, *masks)
    for rows in (slice(0, 2), slice(2, None)):
        part = Problem(parts.bases, parts.adapters, parts.rollouts[rows], parts.targets[rows], parts.scaling)
        packed_backward(part, *(mask[rows] for mask in masks))
    assert relative_error(gradients(parts), gradients(whole)) < 1e-13


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_lower_precision_is_within_its_rounding(dtype, tolerance):
    for seed in range(3):
        problem = make_problem(seed, (2, 3))
        masks = routes_and_masks(problem, seed)
        low = problem.to(dtype)
        expected, _ = reference_gradients(low.to(torch.float64), *masks)
        packed_backward(low, *(mask.float() for mask in masks))
        assert all(p.grad.dtype == dtype for layer in low.adapters for p in layer.values())
        assert relative_error(gradients(low), expected) < tolerance


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_the_kernel_on_cast_tensors(backward_inside):
    problem = make_problem(2, (2, 3)).to(torch.float32)
    cast = problem.to(torch.bfloat16)
    gate, update = (expand_to_tokens(mask.float(), problem.lengths) for mask in routes_and_masks(problem, 4))
    with torch.autocast("cpu", torch.bfloat16):
        out = apply_layer(problem, 0, torch.cat(problem.rollouts), gate, update)
        if backward_inside:
            out.sin().sum().backward()
    if not backward_inside:
        out.sin().sum().backward()
    expected = apply_layer(cast, 0, torch.cat(cast.rollouts), gate, update)
    expected.sin().sum().backward()
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    leaves, cast_leaves = ([*p.adapters[0].values(), *p.rollouts] for p in (problem, cast))
    for have, want in zip(leaves, cast_leaves, strict=True):
        assert have.grad.dtype == torch.float32 and torch.equal(have.grad, want.grad.float())


def test_autocast_is_as_accurate_as_plain_linear_layers():
    """Without masks, against LoRA composed of F.linear under the same autocast; both measured from float64."""

    def plain(problem, layer, x, gate, update):
        (weight, bias), p = problem.bases[layer], problem.adapters[layer]
        down = nn.functional.linear(x, torch.cat((p["A_d"], p["A_q"])))
        up = nn.functional.linear(down, torch.cat((p["B_d"], p["B_q"]), dim=1))
        return nn.functional.linear(x, weight, bias) + up * problem.scaling

    errors = {}
    for apply in (plain, apply_layer):
        total = 0.0
        for seed in range(6):
            problem = make_problem(seed, (2, 3)).to(torch.float32)
            ones = torch.ones(len(problem.rollouts), 2)
            expected, _ = reference_gradients(problem.to(torch.float64), ones, ones)
            with torch.autocast("cpu", torch.bfloat16):
                packed_backward(problem, ones, ones, apply=apply)
            total += relative_error(gradients(problem), expected)
        errors[apply] = total / 6
    assert errors[apply_layer] < 1.25 * errors[plain]


def test_backward_under_a_foreign_autocast_keeps_the_forward_dtype():
    plain, inside = make_problem(2).to(torch.float32), make_problem(2).to(torch.float32)
    for problem, enabled in ((plain, False), (inside, True)):
        out = apply_layer(problem, 0, problem.rollouts[0], None, None)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out.backward(torch.ones_like(out))
    for name, p in plain.adapters[0].items():
        assert torch.equal(p.grad, inside.adapters[0][name].grad)


def test_float64_is_left_alone_by_autocast():
    problem = make_problem(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert apply_layer(problem, 0, problem.rollouts[0], None, None).dtype == torch.float64


def test_adapters_of_another_dtype_are_cast_and_get_gradients_of_their_own():
    problem = make_problem(2)
    base = [(weight.bfloat16(), None) for weight, _ in problem.bases]
    mixed = Problem(base, problem.to(torch.float32).adapters, problem.rollouts, problem.targets, 0.7)
    x = problem.rollouts[0].detach().bfloat16()
    apply_layer(mixed, 0, x, None, None).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mixed.adapters[0].values())


def test_non_reentrant_checkpointing_gives_the_same_bits():
    plain, recomputed = make_problem(5, (2, 3)), make_problem(5, (2, 3))
    masks = routes_and_masks(plain, 6)
    first = packed_backward(plain, *masks)
    second = packed_backward(
        recomputed, *masks, apply=lambda *args: checkpoint(apply_layer, *args, use_reentrant=False)
    )
    assert torch.equal(first, second)
    for have, want in zip(gradients(recomputed), gradients(plain), strict=True):
        assert all(torch.equal(have[name], want[name]) for name in want)


def test_non_contiguous_input_and_output_gradient():
    problem = make_problem(4, (2, 3), rows=2)
    (weight, bias), p = problem.bases[0], problem.adapters[0]
    x = torch.randn(7, 5, 4, dtype=torch.float64).permute(2, 1, 0).requires_grad_()  # [4, 5, 7]
    g = torch.randn(9, 5, 4, dtype=torch.float64).permute(2, 1, 0)
    masks = torch.rand(4, 5, 2).double(), torch.rand(4, 5, 2).double()
    arguments = (weight, bias, p["A_d"], p["A_q"], p["B_d"], p["B_q"], *masks, 0.7)
    routed_linear(x, *arguments).backward(g)
    strided = [q.grad for q in (x, *p.values())]
    for q in (x, *p.values()):
        q.grad = None
    again = x.detach().contiguous().requires_grad_()
    routed_linear(again, *arguments).backward(g.contiguous())
    for have, want in zip(strided, [again.grad, *(q.grad for q in p.values())], strict=True):
        assert torch.allclose(have, want, atol=1e-13)


def test_double_use_in_one_graph_accumulates():
    problem = make_problem(9, rows=2)
    gate, update = (torch.tensor(m).double() for m in ([1.0, 1.0], [0.0, 1.0]))
    singles = []
    for x in problem.rollouts:
        apply_layer(problem, 0, x, gate, update).sin().sum().backward()
        singles.append([p.grad.clone() for p in problem.adapters[0].values()])
        for p in problem.adapters[0].values():
            p.grad = None
    sum(apply_layer(problem, 0, x, gate, update).sin().sum() for x in problem.rollouts).backward()
    for p, first, second in zip(problem.adapters[0].values(), *singles, strict=True):
        assert torch.allclose(p.grad, first + second, atol=1e-13)


def test_routed_lora_is_routed_linear_without_the_base():
    for ranks, deployed_rank in (((3, 3), None), ((2, 5), 2)):
        problem = make_problem(11, ranks, bias=False)
        p = problem.adapters[0]
        x = torch.cat(problem.rollouts).detach().requires_grad_()
        masks = [expand_to_tokens(mask, problem.lengths) for mask in routes_and_masks(problem, 1)]
        zero_base = torch.zeros_like(problem.bases[0][0])
        fused = routed_linear(x, zero_base, None, p["A_d"], p["A_q"], p["B_d"], p["B_q"], *masks, 0.7)
        wanted = torch.autograd.grad(fused.sin().sum(), [x, *p.values()])
        joined_A, joined_B = torch.cat((p["A_d"], p["A_q"])), torch.cat((p["B_d"], p["B_q"]), dim=1)
        alone = routed_lora(x, joined_A, joined_B, *masks, 0.7, deployed_rank)
        found = torch.autograd.grad(alone.sin().sum(), [x, *p.values()])
        assert torch.allclose(alone, fused, atol=1e-13)
        assert all(torch.allclose(have, want, atol=1e-13) for have, want in zip(found, wanted, strict=True))
