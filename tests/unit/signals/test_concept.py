"""The concept direction of advantage modification, by hand, and the positions it is read at."""

import pytest
import torch

from verl_grad_routing.detectors import DETECTORS
from verl_grad_routing.directions import concept_direction, position_mask, project
from verl_grad_routing.errors import UserError


def test_the_direction_is_the_mean_difference_over_pairs_and_layers_unnormalised():
    wanted = torch.zeros(2, 2, 3)
    unwanted = torch.tensor([[[4.0, 0, 0], [0, 2, 0]], [[0, 2, 0], [0, 0, 0]]])
    direction = concept_direction(unwanted, wanted, layers=(2, 3))
    assert direction.vectors_Ld.tolist() == [[1, 1, 0]] * 2
    # <mean_l h_l, d>: pair 1 (2,1,0) -> 3, pair 2 (0,1,0) -> 1
    assert direction.unwanted_scores_P.tolist() == [3, 1] and direction.wanted_mean == 0
    hidden = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = hidden.mean(1) @ torch.tensor([1.0, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(project(hidden, direction.vectors_Ld[None])[:, 0], expected)


def test_held_out_accuracy_is_of_that_direction():
    wanted = torch.zeros(4, 1, 2)
    unwanted = torch.tensor([[[1.0, 0]], [[1, 0.1]], [[1, -0.1]], [[-1, 0]]])
    assert concept_direction(unwanted, wanted).held_out_accuracy == 0.75


def test_equal_sides_are_refused():
    with pytest.raises(UserError, match="same mean activation"):
        concept_direction(torch.ones(2, 1, 3), torch.ones(2, 1, 3))


def test_positions_by_hand():
    mask = torch.tensor([1, 1, 0, 1, 0])
    assert position_mask(mask, 2, "resp_mean").int().tolist() == [0, 0, 1, 1, 0, 1, 0]
    assert position_mask(mask, 2, "resp_last").int().tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert position_mask(mask, 2, "prompt_last").int().tolist() == [0, 1, 0, 0, 0, 0, 0]
    for position in ("resp_mean", "resp_last", "prompt_last"):
        assert not position_mask(torch.zeros(1), 3, position).any()


def test_pairs_are_never_read_in_the_prompt_that_both_sides_share():
    def detector(position):
        settings = {"name": "concept_act", "pairs": "p.jsonl", "position": position}
        return DETECTORS.build(settings, "grad_routing.detector")

    assert [detector(p).pair_position for p in ("resp_last", "resp_mean", "prompt_last")] == [
        "resp_last",
        "resp_mean",
        "resp_last",
    ]
    with pytest.raises(UserError, match=r"grad_routing.detector.position='last': choose one of"):
        detector("last")
