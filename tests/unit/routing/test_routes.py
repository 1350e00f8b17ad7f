"""Routes to masks: the table by hand, properties over random batches, and refusals."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import (
    ACTIVATION_MASKING,
    DEFAULT,
    STRICT,
    Route,
    RouteMasks,
    RoutingTable,
    block_masks,
    expand_to_padded,
    expand_to_tokens,
    slice_for_sequence_parallel,
)

ROUTES = st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=12)


def test_values_of_the_routes_are_fixed():
    assert [(route.name, int(route)) for route in Route] == [("KEEP", 0), ("ABSORB", 1), ("ROUTE", 2)]


@pytest.mark.parametrize(
    ("table", "gate", "update"),
    [
        (DEFAULT, [[1, 0], [1, 1], [1, 1]], [[1, 0], [1, 1], [0, 1]]),
        (STRICT, [[1, 0], [1, 1], [1, 1]], [[1, 0], [1, 0], [0, 1]]),
        (ACTIVATION_MASKING, [[1, 0], [1, 1], [0, 1]], [[1, 0], [1, 1], [0, 1]]),
    ],
)
def test_tables_by_hand(table, gate, update):
    gate_B2, update_B2 = block_masks(list(Route), table)
    assert gate_B2.tolist() == gate and update_B2.tolist() == update
    assert gate_B2.dtype == update_B2.dtype == torch.float32


@pytest.mark.parametrize("table", [DEFAULT, STRICT, ACTIVATION_MASKING])
def test_without_the_quarantine_the_deployed_block_acts_alone_and_learns_what_it_did(table):
    gate_B2, update_B2 = block_masks(list(Route), table.without_quarantine())
    assert gate_B2.tolist() == [[1, 0]] * 3 and update_B2.tolist() == [[1, 0], [1, 0], [0, 0]]


@settings(deadline=None, max_examples=50)
@given(ROUTES, st.data())
def test_each_row_depends_on_its_own_route_and_weight(routes, data):
    weights = data.draw(st.lists(st.floats(0, 1, width=32), min_size=len(routes), max_size=len(routes)))
    gate_B2, update_B2 = block_masks(torch.tensor(routes), DEFAULT, weights)
    for row, (route, weight) in enumerate(zip(routes, weights, strict=True)):
        masks = DEFAULT.masks(route)
        assert gate_B2[row].tolist() == list(masks.forward_gate)
        assert update_B2[row].tolist() == [weight * value for value in masks.update_mask]


@settings(deadline=None, max_examples=50)
@given(ROUTES, st.data())
def test_tokens_of_a_rollout_share_its_masks(routes, data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=len(routes), max_size=len(routes)))
    mask_B2 = torch.rand(len(routes), 2)
    mask_T2 = expand_to_tokens(mask_B2, lengths)
    assert mask_T2.shape == (sum(lengths), 2)
    for row, piece in zip(mask_B2, mask_T2.split(lengths), strict=True):
        assert (piece == row).all()
    padded = expand_to_padded(mask_B2, 5)
    assert padded.shape == (len(routes), 5, 2)
    real = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    assert torch.equal(padded[real], mask_T2)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(1, 8), st.floats(0, 1, width=32))
def test_sequence_parallel_parts_concatenate_to_the_padded_whole(tokens, size, pad_value):
    mask = torch.rand(1, tokens, 2)
    parts = [slice_for_sequence_parallel(mask, rank, size, pad_value) for rank in range(size)]
    whole = torch.cat(parts, dim=1)
    assert len({part.shape for part in parts}) == 1 and whole.shape[1] % size == 0
    assert whole.shape[1] - tokens < size
    assert torch.equal(whole[:, :tokens], mask) and (whole[:, tokens:] == pad_value).all()


def test_empty_batch_has_empty_masks():
    assert [mask.shape for mask in block_masks([])] == [(0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (([3],), "route"),
        (([-1],), "route"),
        (([0.5],), "route"),
        (([True],), "route"),
        (([[0, 1]],), "route"),
        (([0], DEFAULT, [1.5]), "weight"),
        (([0], DEFAULT, [-0.1]), "weight"),
        (([0], DEFAULT, [float("nan")]), "weight"),
        (([0, 1], DEFAULT, [1.0]), "weight"),
    ],
)
def test_bad_routes_and_weights_are_refused(arguments, key):
    with pytest.raises(UserError) as error:
        block_masks(*arguments)
    assert error.value.key == key


@pytest.mark.parametrize(
    "masks",
    [
        {"forward_gate": (1, 2), "update_mask": (1, 1)},
        {"forward_gate": (1, float("nan")), "update_mask": (1, 0)},
        {"forward_gate": (1, 1, 1), "update_mask": (1, 1)},
        {"forward_gate": (1, 0), "update_mask": (1, 1)},
    ],
)
def test_bad_tables_are_refused(masks):
    with pytest.raises(UserError):
        RouteMasks(**masks)


def test_a_table_of_something_else_is_refused():
    with pytest.raises(UserError, match="keep"):
        RoutingTable(keep=(1, 0))  # type: ignore[arg-type]


def test_tables_derive_compare_and_pickle():
    strict = dataclasses.replace(DEFAULT, absorb=RouteMasks((1, 1), (1, 0)))
    assert strict == STRICT and pickle.loads(pickle.dumps(STRICT)) == STRICT


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_bad_sequence_parallel_ranks_are_refused(rank, size):
    with pytest.raises(UserError):
        slice_for_sequence_parallel(torch.ones(1, 4, 2), rank, size)


def test_wrong_mask_shapes_are_refused():
    with pytest.raises(UserError):
        slice_for_sequence_parallel(torch.ones(4, 2), 0, 2)
    with pytest.raises(UserError):
        expand_to_tokens(torch.ones(2, 2), [1, 2, 3])
