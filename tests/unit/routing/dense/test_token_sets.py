"""Products over the tokens that train a block are those over all tokens times its mask."""

from __future__ import annotations

import pytest
import torch

from verl_grad_routing.routing.dense import TokenSets, unit_linear
from verl_grad_routing.routing.dense.kernel import updates_within

TOKENS, INPUTS, OUTPUTS = 24, 10, 14
KEPT = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(TOKENS // 4, 1).reshape(2, TOKENS // 2, 2)
RANGES = {
    "none": [],
    "rows": [(0, 3), (7, 8), (12, 14)],
    "columns": [(1, 4), (9, 10)],
    "scattered rows": [(0, 1), (3, 4), (5, 6), (8, 9), (11, 12)],
    "scattered columns": [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)],
    "one run of rows": [(4, 9)],
    "one run of columns": [(0, 3)],
}
MASKS = {
    "mixed": lambda: torch.randint(0, 2, (TOKENS, 2)),
    "all flagged": lambda: torch.tensor([[0, 1]]).repeat(TOKENS, 1),
    "nothing flagged, some kept": lambda: torch.tensor([[1, 1], [1, 0]]).repeat(TOKENS // 2, 1),
    "both alike": lambda: torch.tensor([[1, 1], [0, 0]]).repeat(TOKENS // 2, 1),
    "nothing teaches": lambda: torch.zeros(TOKENS, 2),
}


def gradient(mask: torch.Tensor, sets: TokenSets | None, side: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, INPUTS, dtype=torch.float64, generator=generator)
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, generator=generator, requires_grad=True)
    y = unit_linear(x, weight, side=side.split()[-1], ranges=RANGES[side], update_mask=mask, token_sets=sets)  # type: ignore[arg-type]
    (y * torch.randn(y.shape, dtype=torch.float64, generator=generator)).sum().backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("side", RANGES)
@pytest.mark.parametrize("mask", MASKS)
def test_as_by_the_mask(mask: str, side: str) -> None:
    torch.manual_seed(0)
    given = MASKS[mask]().double().reshape(2, TOKENS // 2, 2)
    sets = TokenSets.of(given)
    assert sets is not None
    by_mask, by_sets = gradient(given, None, side), gradient(given, sets, side)
    assert (by_mask - by_sets).abs().max() <= 1e-13
    # what no token trains is exactly zero
    assert torch.equal(by_sets[by_mask == 0], by_mask[by_mask == 0])


@pytest.mark.parametrize("side", ["rows", "scattered rows"])
def test_sets_that_are_used_are_those_given(side: str) -> None:
    mask = torch.tensor([1.0, 0.0]).repeat(TOKENS, 1).reshape(2, TOKENS // 2, 2)
    other = TokenSets(torch.tensor([3]), torch.zeros(TOKENS, 1))
    assert not torch.allclose(gradient(mask, other, side), gradient(mask, None, side))
    both = TokenSets(None, torch.ones(TOKENS, 1))  # the quarantine's rows alone learn from other tokens
    changed = (gradient(mask, both, side) != gradient(mask, None, side)).any(dim=1).nonzero().flatten().tolist()
    assert changed == [row for first, last in RANGES[side] for row in range(first, last)]


def test_a_mask_that_is_broadcast_has_no_positions_of_its_own() -> None:
    mask = torch.tensor([[[0.0, 1.0]]])
    assert torch.equal(gradient(mask, TokenSets.of(mask), "rows"), gradient(mask, None, "rows"))


def test_of() -> None:
    assert TokenSets.of(None) is None
    assert TokenSets.of(torch.tensor([[1.0, 0.5], [1.0, 0.0]])) is None
    sets = TokenSets.of(torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
    assert sets is not None and sets.deployed is None and sets.quarantine_T1 is not None
    assert sets.quarantine_T1.tolist() == [[0.0], [1.0]]
    same = TokenSets.of(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert same is not None and same.quarantine_T1 is None and same.deployed is not None
    assert same.deployed.tolist() == [0]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("by_sets", [False, True])
def test_what_is_gated_off_and_teaches_nothing_is_not_kept_twice(alone: bool, by_sets: bool) -> None:
    gate = torch.cat([torch.ones_like(KEPT[..., :1]), KEPT[..., 1:]], -1) if alone else KEPT
    update = gate * torch.tensor([1.0, 1.0, 0.0, 1.0]).repeat(TOKENS // 4).reshape(2, TOKENS // 2, 1)
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for within in (False, True):
        x = torch.randn(2, TOKENS // 2, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x, W = x.requires_grad_(), weight.clone().requires_grad_()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda t: t
        ):
            y = unit_linear(
                x, W, side="columns", ranges=RANGES["columns"], update_mask=update,
                token_sets=TokenSets.of(update) if by_sets else None, forward_gate=gate,
                gates_quarantine_alone=alone, updates_within_gate=within,
            )  # fmt: skip
        assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept) is within
        y.sin().sum().backward()
        found[within] = (y.detach(), x.grad, W.grad)
    for plain, shared in zip(found[False], found[True], strict=True):
        assert torch.equal(plain, shared)


def test_updates_within_the_gate() -> None:
    ones = torch.ones_like(KEPT)
    assert updates_within(None, None) and updates_within(None, ones) and updates_within(KEPT, KEPT)
    assert updates_within(KEPT, KEPT * 0.5) and updates_within(ones, ones)
    assert not updates_within(KEPT, ones) and not updates_within(KEPT, None)
    assert not updates_within(KEPT * 0.5, KEPT)  # half a unit's output teaches half as much
    assert not updates_within(KEPT, KEPT[:1, :1])  # of other positions: not known
