"""Masks of tokens by hand: two rows, one after the other, no engine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions import INTERVENTIONS
from verl_grad_routing.routing import DEFAULT, Route
from verl_grad_routing.training import masks
from verl_grad_routing.training.mass import block_mass
from verl_grad_routing.training.own_gate import closed_rows

K, A, R = int(Route.KEEP), int(Route.ABSORB), int(Route.ROUTE)


def jagged(*rows: list) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def batch(table=DEFAULT, **columns: torch.Tensor) -> TensorDict:
    """A prompt of 2 and a response of 3 tokens; a prompt of 3 and a response of 1."""
    tensors = {
        "input_ids": jagged([5, 6, 7, 8, 9], [1, 2, 3, 4]),
        "loss_mask": jagged([1, 0, 1], [1]),
        "response_mask": jagged([1, 0, 1], [1]),
        "route": torch.tensor([A, R]),
        **columns,
    }
    return tu.get_tensordict(tensors, {"routing_table": table})


TOKENS = {"token_route": jagged([R, A, K], [K])}


def test_a_token_is_routed_one_position_before_it() -> None:
    """Positions 0 and 4 of the first row and 0, 1, 3 of the second predict no token of a response: the row's route."""
    data = batch(**TOKENS)
    assert masks.predicting_positions(data, "token_route").tolist() == [1, 2, 3, 7]
    assert masks.routes_of(data).tolist() == [A, R, A, K, A, R, R, K, R]
    assert data["route"].tolist() == [A, R]  # nothing is changed in place
    gate_T2, update_T2 = masks.masks_of(data)
    assert gate_T2[:, 0].tolist() == [1] * 9 and gate_T2[:, 1].tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert update_T2[:, 0].tolist() == [1, 0, 1, 1, 1, 0, 0, 1, 0]
    assert update_T2[:, 1].tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1]


def test_without_routes_of_tokens_masks_are_of_rows() -> None:
    data = batch()
    assert masks.routes_of(data).tolist() == [A, R] and not masks.of_tokens(data)
    assert masks.masks_of(data)[1].tolist() == [[1, 1], [0, 1]]


def test_a_factor_of_a_routed_token_by_its_weight() -> None:
    """-.75 (1 - w) + w where flagged, 1 elsewhere: w = 0 is -.75, .5 is .125, 1 is 1."""
    table = INTERVENTIONS.build({"name": "cloud", "alpha": -0.75}, "i").table
    weights = jagged([0.0, 0.5, 1.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    found = masks.activation_gradients_of(batch(table, token_weight=weights))
    assert found[:, 0].tolist() == [1, 1, 1, 1, 1, -0.75, 0.125, 1, 1] and (found[:, 1] == 1).all()
    found = masks.activation_gradients_of(batch(table, token_weight=weights, **TOKENS))
    assert found[:, 0].tolist() == [1, 0.125, 1, 1, 1, -0.75, 0.125, 1, 1]
    rows = masks.activation_gradients_of(batch(table))
    assert rows.tolist() == [[1, 1], [-0.75, 1]]


def test_weights_leave_what_is_not_routed_as_it_is() -> None:
    """``off_target`` 0 at the quarantine's units of every position that is not flagged, whatever its weight."""
    table = INTERVENTIONS.build({"name": "cloud", "alpha": -0.75, "off_target": 0.0}, "i").table
    weights = jagged([0.0, 0.5, 1.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    found = masks.activation_gradients_of(batch(table, token_weight=weights))
    assert found[:, 1].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert found[:, 0].tolist() == [1, 1, 1, 1, 1, -0.75, 0.125, 1, 1]
    found = masks.activation_gradients_of(batch(table, token_weight=weights, **TOKENS))
    assert found[:, 1].tolist() == [0, 1, 0, 0, 0, 1, 1, 0, 1]
    assert found[:, 0].tolist() == [1, 0.125, 1, 1, 1, -0.75, 0.125, 1, 1]


def test_row_weights_and_rows_sampled_without_the_quarantine_reach_every_position() -> None:
    data = batch(route_weight=torch.tensor([0.5, 1.0]), **TOKENS)
    assert masks.masks_of(data)[1][:5, 0].tolist() == [0.5, 0, 0.5, 0.5, 0.5]
    data = batch(quarantine_off=torch.tensor([1, 0]), **TOKENS)
    tu.assign_non_tensor(data, quarantine_off_table=DEFAULT.without_quarantine())
    gate_T2, update_T2 = masks.masks_of(data)
    assert gate_T2[:5].tolist() == [[1, 0]] * 5 and update_T2[:5, 0].tolist() == [1, 0, 1, 1, 1]
    assert gate_T2[5:, 1].tolist() == [1, 1, 0, 1]


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield None
    dist.destroy_process_group()


def test_masses_by_hand(group) -> None:
    """Tokens that count: R and K of the first row (its A does not), K of the second."""
    mass = block_mass(batch(**TOKENS), group)
    assert mass.tokens_2.tolist() == [2, 1] and mass.all_tokens == 3
    assert mass.rollouts_2.tolist() == [1.5, 0.5] and mass.all_rollouts == 2  # half of the first row, all of the second
    rows = block_mass(batch(), group)
    assert rows.tokens_2.tolist() == [2, 3] and rows.rollouts_2.tolist() == [1, 2]
    rejected = {"response_mask": jagged([1, 0, 1], [0])}  # as verl's rollout_rs leaves them: the denominator stays
    for columns, tokens, rollouts in ((TOKENS, [1, 1], [0.5, 0.5]), ({}, [2, 2], [1, 1])):
        left = block_mass(batch(**columns, **rejected), group)
        assert left.tokens_2.tolist() == tokens and left.rollouts_2.tolist() == rollouts
        assert (left.all_tokens, left.all_rollouts) == (3, 2)
    nominal = batch(**TOKENS)
    tu.assign_non_tensor(nominal, global_batch_size=8)  # what verl's seq-mean divides by, whatever rows are empty
    mass = block_mass(nominal, group)
    assert mass.all_rollouts == 8 and mass.factors("own_rollouts") == (8 / 1.5, 8 / 0.5)
    assert mass.factors("own_tokens") == (3 / 2, 3)
    bare = batch()
    del bare["route"]
    with pytest.raises(UserError, match="every row of a training batch needs a route"):
        block_mass(bare, group)


def test_a_row_is_closed_by_one_kept_token() -> None:
    routes = torch.tensor([A, R, K, A])
    assert closed_rows(routes, DEFAULT).tolist() == [False, False, True, False]
    tokens, lengths = torch.tensor([A, R, R, K, A, A]), torch.tensor([2, 2, 1, 1])
    assert closed_rows(routes, DEFAULT, (tokens, lengths)).tolist() == [False, True, True, False]


def test_rows_of_a_jagged_column_one_after_another() -> None:
    rows = [torch.arange(3), torch.arange(10, 12)]
    whole = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    padded = torch.nested.nested_tensor_from_jagged(  # as a narrowed column is: gaps between the rows
        torch.tensor([0, 1, 2, 99, 10, 11, 99, 99]), torch.tensor([0, 4, 8]), torch.tensor([3, 2])
    )
    for column in (whole, padded):
        assert masks.lengths_of(column).tolist() == [3, 2]
        assert masks.one_after_another(column).tolist() == [0, 1, 2, 10, 11]
