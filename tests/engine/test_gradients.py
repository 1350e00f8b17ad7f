"""Each block's gradient is the sum over allowed rollouts of their own float64 gradients, however the batch is fed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engine import reference as tables
from tests.engine.reference import block_norm, block_of, relative_error
from tests.engine.rollouts import KEEP, ROUTE
from tests.engine.variants import VARIANTS

pytestmark = pytest.mark.timeout(600)  # the first test waits for a world

RUNS = [
    pytest.param(size, name, id=f"{name}-{words}")
    for size, words in ((1, "one rank"), (2, "two ranks"))
    for name, variant in VARIANTS.items()
    if size in variant.sizes
]


@pytest.mark.parametrize(("size", "name"), RUNS)
def test_gradients_are_the_sum_of_allowed_rollouts(size, name, worlds, reference, inputs):
    variant = VARIANTS[name]
    own = reference(variant.engine.get("ranks", "equal"))
    weighted = variant.batch.get("weighted", False)
    rows = variant.rows(inputs.rollouts)
    expected = own.gradients(rows, variant.loss, getattr(tables, variant.table), weighted)
    actual = worlds(size)["gradients"][name]
    assert relative_error(actual, expected) < variant.tolerance
    for block in ("deployed", "quarantine"):
        assert block_norm(expected, block) > 0.1  # there is something to compare


def test_two_ranks_are_one_rank(worlds):
    one, two = worlds(1)["gradients"], worlds(2)["gradients"]
    for name in one.keys() & two.keys():
        if not name.startswith("bf16"):
            assert relative_error(two[name], {key: value.double() for key, value in one[name].items()}) < 5e-6


def test_the_reference_tells_routes_apart(reference, inputs):
    """What the comparison rests on: other routes, and KEEP's forward gate, give gradients far from these."""
    own, rows = reference(), inputs.rollouts
    expected = own.gradients(rows)
    for wrong in (
        own.gradients([replace(row, route=1) for row in rows]),
        own.gradients(rows, table={**tables.DEFAULT, KEEP: ((1, 1), (1, 0))}),
        own.gradients(rows, table={**tables.DEFAULT, ROUTE: ((1, 1), (1, 1))}),
        own.gradients(rows[::-1][:-1]),
    ):
        assert relative_error(wrong, expected) > 0.1


class TestLogProbs:
    def check(self, actual, rows, expected, tolerance=2e-5):
        for row, have in zip(rows, actual, strict=True):
            assert (have.double() - expected(row)).abs().max() < tolerance

    def test_both_blocks_act_unless_told_otherwise(self, world, reference, inputs):
        found, own = world["log_probs"], reference()
        for name in ("plain", "padded"):
            self.check(found[name], inputs.rollouts, own.log_probs)

    def test_update_masks_do_not_touch_the_forward_pass(self, world):
        found = world["log_probs"]
        assert all(map(torch.equal, found["updates masked"], found["plain"]))
        trained = world["training_forward"]
        assert all(map(torch.equal, trained["routed"], trained["absorbed"]))
        assert all(map(torch.equal, trained["mixed"], trained["absorbed"]))

    def test_a_kept_row_is_gated_also_in_inference(self, world, reference, inputs):
        found, own = world["log_probs"], reference()
        for name in ("gated", "gated padded"):
            self.check(found[name], inputs.rollouts, lambda row: own.log_probs(row, tables.DEFAULT[row.route][0]))

    def test_log_probs_recomputed_under_the_gate_make_the_first_ratio_one(self, world):
        kl = world["training_forward"]["kl of the first step"]
        assert abs(float(getattr(kl, "values", [kl])[0])) < 1e-7

    @pytest.mark.parametrize("feed", ["packed", "padded"])
    def test_in_an_on_policy_update_a_kept_row_brings_its_own_old_log_probs(self, world, feed):
        found = world["training_forward"]
        given = {name: value.double() for name, value in found[f"given old log-probs {feed}"].items()}
        assert relative_error(found[f"current old log-probs {feed}"], given) < 1e-6
        assert relative_error(found["wrong old log-probs packed"], given) > 0.01

    def test_ablation_leaves_the_deployed_block_alone(self, world, reference, inputs):
        found, own = world["log_probs"], reference()
        self.check(found["ablated"], inputs.rollouts, lambda row: own.log_probs(row, (1, 0)))
        assert all(map(torch.equal, found["after ablated"], found["plain"]))

    def test_disabling_the_adapter_leaves_the_bare_base(self, world, reference, inputs):
        found, own = world["log_probs"], reference()
        self.check(found["base"], inputs.rollouts, lambda row: own.log_probs(row, (0, 0)))
        assert all(map(torch.equal, found["after base"], found["plain"])) and found["kept"]

    def test_training_works_after_a_pass_without_adapter(self, world, reference, inputs):
        actual = world["log_probs"]["trained after base"]
        assert {block_of(name) for name in actual} == {"deployed", "quarantine"}
        assert relative_error(actual, reference().gradients(inputs.rollouts)) < 2e-5
