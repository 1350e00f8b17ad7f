"""Directions in activation space and their controls, by hand-computed numbers."""

import math

import pytest
import torch

from verl_grad_routing.directions import (
    Direction,
    difference_of_means,
    haar_directions,
    layers_at_depth,
    permuted_pairs,
    project,
)
from verl_grad_routing.errors import UserError


def test_layers_at_depth():
    assert layers_at_depth(36) == tuple(range(21, 28))
    assert layers_at_depth(28) == (16, 17, 18, 19, 20, 21)
    assert layers_at_depth(4) == (2, 3)
    assert layers_at_depth(1) == (1,)
    assert layers_at_depth(100, 0.29, 0.29) == (29,)  # 0.29 * 100 is 28.999999999999996 in floating point
    assert layers_at_depth(10, 0, 1) == tuple(range(1, 11))
    for low, high in ((0.8, 0.7), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5)):
        with pytest.raises(UserError, match="depth"):
            layers_at_depth(10, low, high)
    with pytest.raises(UserError, match="num_layers"):
        layers_at_depth(0)


def test_difference_of_means_by_hand():
    # differences (3, 4), (3, 4) in layer 1 and (0, 2), (4, 2) in layer 2, whose mean is (2, 2)
    wanted = torch.tensor([[[1.0, 0], [0, 0]], [[0, 1], [1, 1]]])
    unwanted = torch.tensor([[[4.0, 4], [0, 2]], [[3, 5], [5, 3]]])
    direction = difference_of_means(unwanted, wanted, layers=(5, 9), pairs_hash="h")
    root = 2**-0.5
    torch.testing.assert_close(direction.vectors_Ld, torch.tensor([[0.6, 0.8], [root, root]]))
    assert direction.layers == (5, 9) and direction.hidden_size == 2 and direction.pairs_hash == "h"
    # unwanted: layer 1 gives 5.6 and 5.8, layer 2 gives 2 root and 8 root; wanted: .6 and .8, 0 and 2 root
    torch.testing.assert_close(
        direction.unwanted_scores_P, torch.tensor([5.6 + 2 * root, 5.8 + 8 * root], dtype=torch.float64) / 2
    )
    assert direction.unwanted_mean == pytest.approx((11.4 + 10 * root) / 4)
    assert direction.wanted_mean == pytest.approx((1.4 + 2 * root) / 4)
    assert direction.held_out_accuracy == 1.0
    copy = Direction.from_state(direction.to_state())
    assert torch.equal(copy.vectors_Ld, direction.vectors_Ld) and copy.unwanted_mean == direction.unwanted_mean


def test_held_out_accuracy_leaves_the_pair_itself_out():
    # One dimension: the sign of the mean of the others. Differences 1, 1, -1: leaving out the first, the others cancel.
    unwanted = torch.tensor([1.0, 1, -1]).reshape(3, 1, 1)
    assert difference_of_means(unwanted, torch.zeros(3, 1, 1)).held_out_accuracy == 0.0
    unwanted = torch.tensor([1.0, 1, 1, -1]).reshape(4, 1, 1)
    assert difference_of_means(unwanted, torch.zeros(4, 1, 1)).held_out_accuracy == 0.75
    noise = torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(0))
    assert difference_of_means(noise, -noise.flip(0) * 0).held_out_accuracy < 0.75  # overfits, held out does not
    assert difference_of_means(noise + 1, noise * 0.5).held_out_accuracy == 1.0


def test_bad_activations_are_refused():
    good = torch.randn(3, 2, 4)
    for unwanted, wanted in ((good, good[:2]), (good[:1], good[:1] + 1), (good[0], good[0] + 1)):
        with pytest.raises(UserError, match=r"P, L, d"):
            difference_of_means(unwanted, wanted)
    broken = good.clone()
    broken[1, 0, 0] = math.nan
    with pytest.raises(UserError, match=r"wanted\).*pair number 2"):
        difference_of_means(good, broken)
    same = good + 1
    same[:, 1] = good[:, 1]
    with pytest.raises(UserError, match="layer 7"):
        difference_of_means(same, good, layers=(3, 7))
    with pytest.raises(UserError, match="2 layers"):
        difference_of_means(good + 1, good, layers=(3,))


def test_project_by_hand_and_in_any_batch():
    pooled = torch.tensor([[[1.0, 2], [3, 4]], [[0, 1], [1, 0]]])
    vectors = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [0, 0]]])
    assert project(pooled, vectors).tolist() == [[2.5, 1.0], [0.0, 0.5]]
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(17, 7, 501, generator=generator)
    vectors = haar_directions(3, range(7), 501, 0)
    scores = project(pooled, vectors)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.einsum("bld,kld->bk", pooled.double(), vectors.double()) / 7)
    for row in range(17):
        assert torch.equal(project(pooled[row : row + 1], vectors)[0], scores[row])
    assert torch.equal(project(pooled, vectors[1:2])[:, 0], scores[:, 1])
    with pytest.raises(ValueError, match="agree"):
        project(pooled, vectors[:, :6])


def test_haar_directions_are_unit_independent_and_addressable():
    directions = haar_directions(300, (2, 5), 64, 7)
    assert directions.shape == (300, 2, 64) and directions.dtype == torch.float32
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(300, 2))
    assert torch.equal(haar_directions(2, (5,), 64, 7)[1, 0], directions[1, 1])
    assert not torch.equal(haar_directions(1, (2,), 64, 8)[0, 0], directions[0, 0])
    cosines = directions[:, 0] @ directions[:, 0].T
    off_diagonal = cosines[~torch.eye(300, dtype=torch.bool)]
    assert abs(off_diagonal.mean()) < 0.005 and off_diagonal.std() == pytest.approx(1 / 8, rel=0.05)
    assert abs((directions[:, 0] * directions[:, 1]).sum(-1).mean()) < 0.03
    for count, layers, hidden in ((0, (1,), 4), (1, (), 4), (1, (1,), 0)):
        with pytest.raises(UserError):
            haar_directions(count, layers, hidden, 0)


def test_permuted_pairs_cancel_what_the_pairs_share():
    # differences 1, 2, 4 times the first axis plus 10 times the second: the shared second axis must vanish
    wanted = torch.zeros(3, 1, 2)
    unwanted = torch.tensor([[1.0, 10], [2, 10], [4, 10]]).reshape(3, 1, 2)
    gaps = set()
    for seed in range(40):
        control = permuted_pairs(unwanted, wanted, seed=seed, pairs_hash="h")
        assert control.vectors_Ld.abs().tolist() == [[1, 0]]
        assert control.pairs_hash == "h" and math.isnan(control.held_out_accuracy)
        gaps.add((control.unwanted_mean - control.wanted_mean) * float(control.vectors_Ld[0, 0]))
    assert gaps == {0.5, -0.5, 1.5, -1.5, 1.0, -1.0}  # half of 2 - 1, 4 - 1 and 4 - 2, either sign
    noise = torch.randn(10, 2, 128, generator=torch.Generator().manual_seed(1))
    unwanted, wanted = noise + 1, noise.roll(1, 0)
    real = difference_of_means(unwanted, wanted).vectors_Ld
    controls = [permuted_pairs(unwanted, wanted, seed=seed).vectors_Ld for seed in range(20)]
    assert max(float((control * real).sum(-1).abs().max()) for control in controls) < 0.3
    assert torch.equal(controls[3], permuted_pairs(unwanted, wanted, seed=3).vectors_Ld)
    assert not torch.equal(controls[3], controls[4])
