"""A step with confessions is the answers' step plus a weight times the confessions', as if each had been alone."""

from __future__ import annotations

import math

import pytest
import torch

from tests.engine.conftest import Results
from tests.engine.reference import Reference, relative_error
from tests.engine.rollouts import RICH
from tests.engine.scenarios_confessions import LOSSES, WEIGHT, mixed, padded

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("name", [*LOSSES, "padded"])
def test_each_loss_has_its_own_denominators(world: Results, reference, inputs, name: str) -> None:
    """Against float64, one rollout at a time, over all ranks and micro-batches."""
    own: Reference = reference()
    rows, loss = mixed(inputs.rollouts), LOSSES.get(name, RICH)
    answers, confessions = ([row for row in rows if row.confession is kind] for kind in (False, True))
    alone, beside = own.gradients(answers, loss), own.gradients(confessions, loss)
    expected = {key: value + WEIGHT * beside[key] for key, value in alone.items()}
    assert relative_error(world["confessions"][name], expected) < 2e-4
    together = own.gradients(rows, loss)
    assert relative_error(together, expected) > 1e-2  # verl's own, over all rows


@pytest.mark.parametrize("name", LOSSES)
def test_every_sample_has_one_vote(world: Results, reference, inputs, name: str) -> None:
    """Six answers and four confessions beside two rows of padding: a weight of 4 / 6, on one rank and on two."""
    own: Reference = reference()
    rows = [row for row in padded(inputs.rollouts) if not row.padding]
    answers, confessions = ([row for row in rows if row.confession is kind] for kind in (False, True))
    assert (len(answers), len(confessions)) == (6, 4)
    alone, beside = own.gradients(answers, LOSSES[name]), own.gradients(confessions, LOSSES[name])
    expected = {key: value + 4 / 6 * beside[key] for key, value in alone.items()}
    assert relative_error(world["confessions"][f"votes, {name}"], expected) < 2e-4


def test_a_step_without_confessions_is_bitwise_the_vanilla_one(world: Results) -> None:
    found = world["confessions"]
    plain, column = found["no column"], found["no confession"]
    assert plain.keys() == column.keys()
    assert all(torch.equal(value, column[name]) for name, value in plain.items())


def test_metrics_are_told_apart(world: Results) -> None:
    metrics = world["confessions"]["metrics"]
    for key in ("actor/pg_loss", "confession/pg_loss", "kl_loss", "confession/kl_loss"):
        assert math.isfinite(metrics[key]), key
    assert metrics["actor/pg_loss"] != metrics["confession/pg_loss"]
