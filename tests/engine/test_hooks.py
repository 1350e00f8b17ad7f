"""The three engine hooks reach exactly where they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engine.reference import block_of, relative_error, same
from tests.engine.rollouts import PLAIN

pytestmark = pytest.mark.timeout(600)


def test_an_extra_loss_is_routed_as_the_loss_is(world, reference, inputs):
    expected = reference().gradients(inputs.rollouts, replace(PLAIN, squares=0.4))
    assert relative_error(world["hooks"]["squares"]["gradients"], expected) < 1e-5
    assert relative_error(world["hooks"]["none"]["gradients"], expected) > 0.1


def test_an_extra_loss_is_reported(world):
    metrics = world["hooks"]["squares"]["metrics"]
    assert metrics["routing/extra_loss/test_squares"] > 0


def test_transformed_gradients_are_what_is_clipped_and_stepped(world):
    plain, zero = world["hooks"]["none"], world["hooks"]["zero"]
    assert zero["metrics"]["routing/grad_norm/deployed"] == 0 < plain["metrics"]["routing/grad_norm/deployed"]
    assert same(plain["first"], zero["first"], "quarantine")
    moments = [n for n in zero["first"] if n.endswith("exp_avg") and block_of(n) == "deployed"]
    assert moments and all(zero["first"][name].abs().max() == 0 for name in moments)


def test_a_transformed_update_is_what_remains(world, inputs):
    plain, revert = world["hooks"]["none"], world["hooks"]["revert"]
    for name, value in inputs.adapters["equal"].items():
        if block_of(name) == "deployed":
            assert torch.equal(revert["second"][name], value) and not torch.equal(plain["second"][name], value)
    assert revert["metrics"]["routing/update_norm/deployed"] == 0 < revert["metrics"]["routing/update_norm/quarantine"]
    assert same(plain["first"], revert["first"], "quarantine")


def test_hooks_work_together(world):
    both = world["hooks"]["both"]["metrics"]
    assert both["routing/grad_norm/quarantine"] == 0 and both["routing/update_norm/deployed"] == 0
