"""Rows that were sampled with the quarantine off: their log-probs, their gradients, their mass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engine import reference as tables
from tests.engine.reference import relative_error
from tests.engine.rollouts import RICH
from tests.engine.scenarios_quarantine_off import FEEDS, half_off

pytestmark = pytest.mark.timeout(600)

OFF = 3
"""Added to the route of such a row for the reference, which has one table."""

ALONE = {  # route + OFF -> (forward gate, update mask): the quarantine is absent, flagged rows train nothing
    0 + OFF: ((1, 0), (1, 0)),
    1 + OFF: ((1, 0), (1, 0)),
    2 + OFF: ((1, 0), (0, 0)),
}


def expected(reference, inputs, loss=RICH, table=tables.DEFAULT, alone=ALONE):
    rows = [replace(row, route=row.route + OFF * row.off) for row in half_off(inputs.rollouts)]
    return reference().gradients(rows, loss, {**table, **alone})


@pytest.mark.parametrize("feed", FEEDS)
def test_log_probs_are_those_of_the_policy_that_sampled(feed, world, reference, inputs):
    own, apart = reference(), 0.0
    for row, have in zip(half_off(inputs.rollouts), world["quarantine_off"][f"log-probs {feed}"], strict=True):
        other = own.log_probs(row, (1, 1) if row.off else (1, 0))
        assert (have.double() - own.log_probs(row, (1, 0) if row.off else (1, 1))).abs().max() < 2e-5
        apart = max(apart, float((have.double() - other).abs().max()))
    assert apart > 0.1  # the gates differ


@pytest.mark.parametrize("feed", [*FEEDS, "checkpointed"])
def test_they_train_as_they_were_sampled(feed, world, reference, inputs):
    assert relative_error(world["quarantine_off"][f"as sampled {feed}"], expected(reference, inputs)) < 1e-5


@pytest.mark.parametrize("feed", FEEDS)
def test_or_as_the_table_says(feed, world, reference, inputs):
    routed = {route + OFF: masks for route, masks in tables.DEFAULT.items()}
    want = expected(reference, inputs, alone=routed)
    assert relative_error(world["quarantine_off"][f"as routed {feed}"], want) < 1e-5
    assert relative_error(want, expected(reference, inputs)) > 0.05


def test_a_strict_quarantine_stays_out_of_them_too(world, reference, inputs):
    want = expected(reference, inputs, tables.PLAIN, tables.STRICT)
    assert relative_error(world["quarantine_off"]["strict"], want) < 1e-5


def test_only_rows_sampled_with_both_blocks_take_the_current_log_probs(world):
    found = world["quarantine_off"]
    given = {name: value.double() for name, value in found["given"].items()}
    assert relative_error(found["current"], given) < 1e-6
    assert relative_error(found["wrong"], given) > 0.01


def test_without_such_rows_nothing_changes(world):
    found = world["quarantine_off"]
    assert all(torch.equal(value, found["no column"][name]) for name, value in found["all on"].items())


def test_mass_counts_what_trains(world, inputs):
    found = world["quarantine_off"]
    tokens, rows = found["tokens"], half_off(inputs.rollouts)
    deployed = sum(int(count) for count, row in zip(tokens, rows, strict=True) if row.route in (0, 1))
    quarantine = sum(int(count) for count, row in zip(tokens, rows, strict=True) if row.route in (1, 2) and not row.off)
    assert found["mass"] == [deployed, quarantine]
