"""Pooled activations: right in value, and the same bit for bit whatever else is in the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_grad_routing.directions import PoolPlan, pool_padded, pool_tokens


def test_means_by_hand():
    hidden = torch.tensor([[1.0, 10], [2, 20], [6, 60], [5, 50], [9, 90]])
    mask = torch.tensor([1, 1, 1, 0, 1])
    pooled, has_tokens = pool_tokens(hidden, mask, torch.tensor([0, 0, 0, 2, 1]), 3)
    assert pooled.tolist() == [[3, 30], [9, 90], [0, 0]]
    assert has_tokens.tolist() == [True, True, False]


def test_masked_tokens_are_never_read_and_may_have_any_segment():
    hidden = torch.tensor([[1.0], [float("nan")], [3.0], [float("inf")]])
    pooled, _ = pool_tokens(hidden, torch.tensor([True, False, True, False]), torch.tensor([0, -1, 0, 99]), 1)
    assert pooled.tolist() == [[2.0]]


def test_dtypes():
    mask, segment = torch.ones(3), torch.zeros(3, dtype=torch.long)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for dtype, result in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        pooled, _ = pool_tokens(hidden.to(dtype), mask, segment, 1)
        assert pooled.dtype == result and not pooled.requires_grad
    # sums are float32 even where the hidden states are not: 257 is no bfloat16
    many = torch.ones(257, 1, dtype=torch.bfloat16)
    pooled, _ = pool_tokens(many, torch.ones(257), torch.zeros(257, dtype=torch.long), 1)
    assert pooled.item() == 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(0, 2**31), st.booleans())
def test_a_rollout_is_bitwise_the_same_alone_and_among_others(lengths, seed, shuffled):
    generator = torch.Generator().manual_seed(seed)
    rollouts = [
        torch.randn(length, 33, generator=generator) * 10 ** torch.randn(1, generator=generator) for length in lengths
    ]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    hidden = torch.cat(rollouts)
    if shuffled:  # tokens of rollouts interleaved, each rollout's own order kept
        order = torch.argsort(torch.rand(len(segment), generator=generator))
        segment = segment[order]
        hidden = torch.empty_like(hidden)
        for index, rollout in enumerate(rollouts):
            hidden[segment == index] = rollout
    packed, has_tokens = pool_tokens(hidden, torch.ones(len(segment)), segment, len(lengths))
    longest = max(max(lengths), 1)
    padded = torch.full((len(lengths), longest, 33), float("nan"))
    mask = torch.zeros(len(lengths), longest)
    for index, rollout in enumerate(rollouts):
        at = longest - len(rollout)
        padded[index, at:], mask[index, at:] = rollout, 1
        alone, _ = pool_tokens(rollout, torch.ones(len(rollout)), torch.zeros(len(rollout), dtype=torch.long), 1)
        assert torch.equal(alone[0].view(torch.int32), packed[index].view(torch.int32))
        exact = rollout.double().mean(0) if len(rollout) else torch.zeros(33, dtype=torch.float64)
        torch.testing.assert_close(packed[index].double(), exact, rtol=1e-5, atol=1e-5)
    from_padded, has_padded = pool_padded(padded, mask)
    assert torch.equal(from_padded.view(torch.int32), packed.view(torch.int32))
    assert has_padded.tolist() == has_tokens.tolist() == [length > 0 for length in lengths]


def test_one_plan_serves_all_layers_and_refuses_other_shapes():
    plan = PoolPlan(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 1]), 2)
    assert plan.mean(torch.tensor([[1.0], [2], [3]])).tolist() == [[1], [2]]
    assert plan.mean(torch.tensor([[4.0], [5], [6]])).tolist() == [[4], [5]]
    with pytest.raises(ValueError, match="must be"):
        plan.mean(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="belongs to rollout"):
        PoolPlan(torch.ones(2), torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match="both"):
        PoolPlan(torch.ones(2), torch.zeros(3, dtype=torch.long), 2)
