"""Agreement of two methods, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from verl_grad_routing.training.agreement import kappa, mass_discarded, overlap, rank_correlation, verdict_agreement

T, F = True, False


def test_rank_correlation_is_spearmans() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)) without ties: ranks 1 2 3 4 against 2 1 4 3 give 1 - 6 * 4 / 60."""
    ours, theirs = torch.tensor([0.1, 0.2, 0.3, 9.0]), torch.tensor([-5.0, -7.0, 2.0, 1.0])
    assert rank_correlation(ours, theirs) == pytest.approx(0.6)
    assert rank_correlation(ours, ours.exp()) == pytest.approx(1) and rank_correlation(ours, -ours) == pytest.approx(-1)
    assert math.isnan(rank_correlation(ours, torch.zeros(4)))


def test_verdicts() -> None:
    """Both flag 1, either flags 3 of 5; observed agreement 3/5, by chance (2*2 + 3*3)/25 = 13/25."""
    ours, theirs = torch.tensor([T, T, F, F, F]), torch.tensor([T, F, T, F, F])
    found = verdict_agreement(ours, theirs)
    assert found["overlap"] == pytest.approx(1 / 3) and found["agreement"] == pytest.approx(0.6)
    assert found["kappa"] == pytest.approx((3 / 5 - 13 / 25) / (1 - 13 / 25)) and found["share_flagged"] == 0.4


def test_verdicts_without_anything_flagged() -> None:
    nothing, some = torch.tensor([F, F, F]), torch.tensor([T, F, F])
    assert math.isnan(overlap(nothing, nothing)) and math.isnan(kappa(nothing, nothing))
    assert overlap(nothing, some) == 0 and kappa(nothing, some) == 0
    assert math.isnan(kappa(~nothing, nothing)) and verdict_agreement(~nothing, nothing)["agreement"] == 0


def test_mass_that_does_not_reach_what_is_deployed() -> None:
    """Plain mass 2+2 + 1+1 + 4 + 3 = 13; left: halved 2, turned 0, grown 4, withheld 0."""
    plain = torch.tensor([[2.0, 2.0], [-1.0, -1.0], [4.0, 0.0], [3.0, 0.0]])
    taught = torch.tensor([[1.0, 1.0], [2.0, 2.0], [9.0, 0.0], [3.0, 0.0]])
    update = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert mass_discarded(plain, taught, update) == pytest.approx(1 - 6 / 13)
    assert mass_discarded(plain, plain, torch.ones(4)) == 0
    assert mass_discarded(plain, torch.zeros_like(plain), torch.ones(4)) == 1
    assert math.isnan(mass_discarded(plain * 0, taught, update))
