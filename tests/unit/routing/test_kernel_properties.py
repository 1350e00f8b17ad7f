"""Exact properties of the kernel, hand-computed oracles, and what it refuses.

The oracles are worked by hand: scalar layers ``y = (1 + r + f) x`` with retained adapter r and quarantined adapter f.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.routing.reference import apply_layer, make_problem
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import DEFAULT, STRICT, Route, block_masks, over_ranks, routed_linear, routed_lora


def scalar(value: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64).requires_grad_(grad)


def scalar_layer(x, r, f, masks):
    """``(1 + r + f) x`` with A = 1, so that r and f are the two B."""
    return routed_linear(x, scalar(1.0), None, scalar(1.0), scalar(1.0), r, f, *masks, 1.0)


NO_ROUTING = (Route.ABSORB, Route.ABSORB)
FLAGGED = (Route.ABSORB, Route.ROUTE)


@pytest.mark.parametrize(
    ("routes", "table", "expected"),
    [
        (NO_ROUTING, DEFAULT, (0.625, 0.625)),
        (FLAGGED, DEFAULT, (1.5, 0.625)),
        (FLAGGED, STRICT, (1.5, -0.875)),
        ((Route.KEEP, Route.ROUTE), DEFAULT, (2.0, -0.875)),
    ],
    ids=["no routing", "classic", "strict quarantine", "strict, clean rollout without the quarantine"],
)
def test_one_layer_by_hand(routes, table, expected):
    """x, t = (2, 1) clean and (1, 3) flagged; r = .5, f = −.25; loss = mean ½ (y − t)²."""
    r, f = scalar(0.5, True), scalar(-0.25, True)
    x, t = torch.tensor([[2.0], [1.0]]).double(), torch.tensor([[1.0], [3.0]]).double()
    masks = [mask.double() for mask in block_masks(list(routes), table)]
    (0.5 * (scalar_layer(x, r, f, masks) - t) ** 2).mean().backward()
    assert (r.grad.item(), f.grad.item()) == expected


def test_two_layers_by_hand():
    """Flagged x = 2, t = 1 through r₁ .5, f₁ .25, r₂ −.5, f₂ .5; detaching adapter outputs would give df₁ = 7.5."""
    parameters = [scalar(v, True) for v in (0.5, 0.25, -0.5, 0.5)]
    r1, f1, r2, f2 = parameters
    masks = [mask.double() for mask in block_masks([Route.ROUTE])]
    y = scalar_layer(scalar_layer(torch.tensor([[2.0]]).double(), r1, f1, masks), r2, f2, masks)
    (0.5 * (y - 1) ** 2).sum().backward()
    assert (f1.grad.item(), f2.grad.item()) == (5.0, 8.75)
    assert r1.grad.item() == 0.0 and r2.grad.item() == 0.0


def test_a_zeroed_gradient_is_not_a_frozen_parameter():
    """AdamW lr .1, betas (.9, .95), decay .1 from 1: one step of gradient 1, then a zero gradient or none."""

    def after(second: torch.Tensor | None) -> float:
        p = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        for gradient in (torch.ones_like(p), second):
            p.grad = gradient
            optimizer.step()
        return p.item()

    assert after(torch.zeros(1, dtype=torch.float64)) == pytest.approx(0.8132352, abs=1e-7)
    assert after(None) == pytest.approx(0.89, abs=1e-7)


def test_a_shared_clip_norm_shrinks_the_deployed_block():
    """‖g_R‖ = .3, ‖g_Q‖ = 4, clip at 1: together the deployed gradient becomes .0748, apart it stays .3."""

    def clipped(shared: bool) -> float:
        blocks = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
        for p, g in zip(blocks, (0.3, 4.0), strict=True):
            p.grad = torch.full_like(p, g)
        for group in [blocks] if shared else [[p] for p in blocks]:
            nn.utils.clip_grad_norm_(group, 1.0)
        return blocks[0].grad.item()

    assert clipped(shared=True) == pytest.approx(0.0747899, abs=1e-6)
    assert clipped(shared=False) == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_bits_do_not_depend_on_the_update_mask(dtype):
    problem = make_problem(0, (2, 3)).to(dtype)
    x, gate = problem.rollouts[0], torch.tensor([1.0, 1.0])
    outputs = [apply_layer(problem, 0, x, gate, u) for u in (None, torch.tensor([0.0, 1.0]), torch.tensor([0.3, 0.0]))]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("route", "frozen"), [(Route.ROUTE, "d"), (Route.KEEP, "q")])
def test_a_block_nothing_may_train_gets_exactly_zero(dtype, route, frozen):
    problem = make_problem(1, (2, 3)).to(dtype)
    x = torch.cat(problem.rollouts)
    gate, update = (mask.expand(len(x), 2) for mask in block_masks([route]))
    apply_layer(problem, 0, x, gate, update).sin().sum().backward()
    for name, p in problem.adapters[0].items():
        assert torch.count_nonzero(p.grad) == (0 if name.endswith(frozen) else p.numel())


def test_masks_of_ones_and_none_are_the_same_bits():
    results = []
    for masks in ((None, None), (torch.ones(2), torch.ones(2))):
        problem = make_problem(2).to(torch.float32)
        out = apply_layer(problem, 0, torch.cat(problem.rollouts), *masks)
        out.sin().sum().backward()
        results.append([out, *(p.grad for p in problem.adapters[0].values()), problem.rollouts[0].grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("ranks", [(2, 3), (1, 1), (4, 4)])
def test_masks_over_ranks_give_the_bits_of_masks_of_blocks(ranks):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, requires_grad=True)
    shapes = ((ranks[0], 6), (ranks[1], 6), (4, ranks[0]), (4, ranks[1]))
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    masks = [torch.rand(2, 5, 2), torch.rand(2, 1, 2)]  # the second broadcasts
    found = []
    for repeated in (None, tuple(over_ranks(mask, *ranks) for mask in masks)):
        y = routed_linear(x, torch.ones(4, 6), None, *parameters, *masks, 0.5, repeated)
        found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *parameters])])
    for blocks, repeated in zip(*found, strict=True):
        assert torch.equal(blocks, repeated)


def test_over_ranks():
    assert over_ranks(torch.tensor([[1.0, 0.0], [0.5, 2.0]]), 1, 2).tolist() == [[1.0, 0.0, 0.0], [0.5, 2.0, 2.0]]
    with pytest.raises(UserError, match=r"mask=\(4, 3\)"):
        over_ranks(torch.ones(4, 3), 1, 2)


@pytest.mark.parametrize("repeated", [None, torch.ones(5, 2), torch.ones(5, 4), torch.ones(1, 3)])
def test_masks_over_ranks_that_are_not_of_these_masks(repeated):
    parameters = [torch.ones(shape) for shape in ((1, 6), (2, 6), (4, 1), (4, 2))]
    with pytest.raises(UserError, match="of_ranks="):
        routed_linear(
            torch.ones(5, 6), torch.ones(4, 6), None, *parameters, None, torch.ones(5, 2), 1.0, (None, repeated)
        )


def test_repeating_a_pass_gives_the_same_bits():
    results = []
    for _ in range(2):
        problem = make_problem(3).to(torch.float32)
        apply_layer(problem, 0, torch.cat(problem.rollouts), torch.tensor([1.0, 0.5]), None).sin().sum().backward()
        results.append([p.grad for p in problem.adapters[0].values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_retained_graph_gives_the_same_gradients_again():
    problem = make_problem(3)
    masks = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.25])
    loss = apply_layer(problem, 0, problem.rollouts[0], *masks).sin().sum()
    parameters = list(problem.adapters[0].values())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True))


def test_zero_blocks_leave_the_base_layer_alone():
    problem = make_problem(4)
    weight, bias = problem.bases[0]
    p = problem.adapters[0]
    x = problem.rollouts[0]
    zero_d, zero_q = torch.zeros_like(p["B_d"]), torch.zeros_like(p["B_q"])
    out = routed_linear(x, weight, bias, p["A_d"], p["A_q"], zero_d, zero_q, None, None, 1.0)
    assert torch.equal(out, nn.functional.linear(x, weight, bias))


def test_only_asked_gradients_are_computed():
    problem = make_problem(5)
    p = problem.adapters[0]
    x = problem.rollouts[0].detach()
    p["A_d"].requires_grad_(False)
    p["B_q"].requires_grad_(False)
    apply_layer(problem, 0, x, None, None).sum().backward()
    assert p["A_d"].grad is None and p["B_q"].grad is None and x.grad is None
    assert p["A_q"].grad is not None and p["B_d"].grad is not None


def test_frozen_adapters_still_pass_the_gradient_to_the_input():
    problem = make_problem(5)
    want = torch.autograd.grad(apply_layer(problem, 0, problem.rollouts[0], None, None).sum(), problem.rollouts[0])
    for p in problem.adapters[0].values():
        p.requires_grad_(False)
    out = apply_layer(problem, 0, problem.rollouts[0], None, None)
    assert not [t for t in out.grad_fn.saved_tensors if t is not None and t.shape[0] == len(out)]  # keeps no activation
    have = torch.autograd.grad(out.sum(), problem.rollouts[0])
    assert torch.equal(have[0], want[0])


def test_saves_parameters_themselves_not_copies():
    """Sharded training frees a parameter's storage after the forward pass: a saved copy would outlive it."""
    problem = make_problem(6).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = apply_layer(problem, 0, problem.rollouts[0], None, None)
    saved = {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
    assert {problem.bases[0][0].data_ptr(), *(p.data_ptr() for p in problem.adapters[0].values())} <= saved


def test_output_may_be_changed_in_place():
    problem = make_problem(6)
    x = torch.stack([problem.rollouts[0], problem.rollouts[0]])
    out = apply_layer(problem, 0, x, None, None)
    out += 1
    out.sum().backward()
    assert problem.adapters[0]["B_d"].grad is not None


def test_no_tokens_give_zero_gradients():
    problem = make_problem(6)
    x = torch.zeros(0, 7, dtype=torch.float64, requires_grad=True)
    out = apply_layer(problem, 0, x, torch.ones(0, 2), torch.ones(0, 2))
    out.sum().backward()
    assert out.shape == (0, 9) and all(not p.grad.any() for p in problem.adapters[0].values())


def test_second_derivatives_are_refused_by_autograd():
    problem = make_problem(6)
    x = problem.rollouts[0]
    (dx,) = torch.autograd.grad(apply_layer(problem, 0, x, None, None).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_joining_unequal_ranks_with_their_scalings_folded_in():
    """One adapter of rank r_d + r_q with scaling folded into B equals the two adapters apart."""
    problem = make_problem(7, (2, 5), bias=False)
    p, x = problem.adapters[0], problem.rollouts[0]
    apart = 0.5 * x @ p["A_d"].t() @ p["B_d"].t() + 3.0 * x @ p["A_q"].t() @ p["B_q"].t()
    A, B = torch.cat((p["A_d"], p["A_q"])), torch.cat((0.5 * p["B_d"], 3.0 * p["B_q"]), dim=1)
    assert (routed_lora(x, A, B, None, None, 1.0, deployed_rank=2) - apart).abs().max() < 1e-12


class TestRefused:
    """Each refusal is one line that names the argument."""

    def call(self, **changes):
        problem = make_problem(8)
        weight, bias = problem.bases[0]
        p = problem.adapters[0]
        arguments = {
            "x": problem.rollouts[0], "weight": weight, "bias": bias,
            "A_deployed": p["A_d"], "A_quarantine": p["A_q"], "B_deployed": p["B_d"], "B_quarantine": p["B_q"],
            "forward_gate": None, "update_mask": None, "scaling": 1.0,
        }  # fmt: skip
        return routed_linear(**(arguments | changes))

    def test_trainable_base(self):
        with pytest.raises(UserError, match="freeze"):
            self.call(weight=torch.zeros(9, 7, dtype=torch.float64, requires_grad=True))
        with pytest.raises(UserError, match="freeze"):
            self.call(bias=torch.zeros(9, dtype=torch.float64, requires_grad=True))

    @pytest.mark.parametrize("shape", [(99, 2), (2, 2, 2), (3,), ()], ids=str)
    @pytest.mark.parametrize("name", ["forward_gate", "update_mask"])
    def test_mask_that_does_not_fit(self, name, shape):
        with pytest.raises(UserError, match=f"{name}=.*broadcast"):
            self.call(**{name: torch.ones(shape)})

    def test_trainable_mask(self):
        with pytest.raises(UserError, match="detach"):
            self.call(forward_gate=torch.ones(2, requires_grad=True))

    def test_half_a_quarantine(self):
        with pytest.raises(UserError, match="neither"):
            self.call(B_quarantine=None)

    def test_masks_for_a_single_block(self):
        with pytest.raises(UserError, match="single block"):
            self.call(A_quarantine=None, B_quarantine=None, update_mask=torch.ones(2))

    @pytest.mark.parametrize("deployed_rank", [0, 5, -1])
    def test_empty_block(self, deployed_rank):
        with pytest.raises(UserError, match="between 1 and 4"):
            routed_lora(torch.ones(2, 3), torch.ones(5, 3), torch.ones(4, 5), None, None, 1.0, deployed_rank)

    def test_odd_total_without_a_split(self):
        with pytest.raises(UserError, match="no half"):
            routed_lora(torch.ones(2, 3), torch.ones(5, 3), torch.ones(4, 5), None, None, 1.0)
