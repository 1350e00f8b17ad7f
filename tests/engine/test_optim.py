"""Optimisation settings of the blocks against AdamW's own formula; the defaults bit for bit; resuming."""

from __future__ import annotations

import math

import pytest
import torch

from tests.engine.reference import ADAPTERS, block_norm, block_of, of_block, same
from tests.engine.scenarios_optim import CLIP

pytestmark = pytest.mark.timeout(600)

LR, DECAY, BETAS = 1e-2, 0.1, (0.9, 0.999)


def adamw(before, after, name, step, lr, decay, betas, start=0.0):
    """What AdamW makes of a parameter with the moments that were found, decaying towards ``start``."""
    mean, square = (after[f"{name}/{key}"].double() for key in ("exp_avg", "exp_avg_sq"))
    direction = (mean / (1 - betas[0] ** step)) / ((square / (1 - betas[1] ** step)).sqrt() + 1e-8)
    here = before[name].double()
    return here - lr * decay * (here - start) - lr * direction


def check_moments(state, gradients, factors, betas):
    for name, gradient in gradients.items():
        block = block_of(name)
        first, second = betas[block]
        scaled = gradient * factors[block]
        for key, expected in (("exp_avg", (1 - first) * scaled), ("exp_avg_sq", (1 - second) * scaled**2)):
            assert (state[f"{name}/{key}"] - expected).abs().max() < 3e-5 * expected.abs().max(), (name, key)


def test_the_defaults_written_out_change_nothing(world):
    for one, other in zip(
        *(world["optim"][name]["states"] for name in ("defaults", "defaults written out")), strict=True
    ):
        assert all(same(one, other, block) for block in ADAPTERS)


def test_each_block_has_its_own_rate_moments_and_decay(world, reference, inputs):
    found = world["optim"]["own rates and moments"]
    own = {"deployed": (LR, 0.4, BETAS), "quarantine": (3 * LR, DECAY, (0.5, 0.9))}
    betas = {block: settings[2] for block, settings in own.items()}
    check_moments(found["states"][1], reference().gradients(inputs.rollouts), dict.fromkeys(ADAPTERS, 1.0), betas)
    for step in (1, 2):
        before, after = found["states"][step - 1 : step + 1]
        for name in inputs.adapters["equal"]:
            assert (after[name] - adamw(before, after, name, step, *own[block_of(name)])).abs().max() < 2e-6
    rates = {block: found["metrics"][0][f"routing/lr/{block}"] for block in ADAPTERS}
    assert rates == pytest.approx({"deployed": LR, "quarantine": 3 * LR})
    assert "routing/lr/quarantine" not in world["optim"]["defaults"]["metrics"][0]


def test_decay_towards_the_start(world, inputs):
    states = world["optim"]["towards the start"]["states"]
    decay = {"deployed": DECAY, "quarantine": 2.0}
    for step in (1, 2):
        before, after = states[step - 1 : step + 1]
        for name in inputs.adapters["equal"]:
            start = states[0][name].double()
            expected = adamw(before, after, name, step, LR, decay[block_of(name)], BETAS, start)
            assert (after[name] - expected).abs().max() < 1e-6
    towards_zero = [
        (states[2][n] - adamw(states[1], states[2], n, 2, LR, 2.0, BETAS)).abs().max()
        for n in of_block(inputs.adapters["equal"], "quarantine")
        if ".lora_A." in n
    ]
    assert min(towards_zero) > 1e-4  # the formula above could have told them apart


def test_one_norm_over_both_blocks(world, reference, inputs):
    gradients = reference().gradients(inputs.rollouts)
    norms = {block: block_norm(gradients, block) for block in ADAPTERS}
    factor = CLIP / math.hypot(*norms.values())
    found = world["optim"]["jointly"]
    check_moments(found["states"][1], gradients, dict.fromkeys(ADAPTERS, factor), dict.fromkeys(ADAPTERS, BETAS))
    for block, norm in norms.items():
        assert found["metrics"][0][f"routing/grad_norm/{block}"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("mean_over", ["own_tokens", "own_rollouts"])
def test_a_mean_over_a_blocks_own_part(mean_over, world, reference, inputs):
    """Keep and absorb rows train the deployed block, absorb and route rows the quarantine."""
    sizes = [int(row.mask.sum()) if mean_over == "own_tokens" else int(row.mask.any()) for row in inputs.rollouts]
    own = {
        block: sum(size for size, row in zip(sizes, inputs.rollouts, strict=True) if row.route in routes)
        for block, routes in (("deployed", (0, 1)), ("quarantine", (1, 2)))
    }
    # verl's means over rollouts divide by the mini-batch's nominal number, the rollout without a token included
    whole = sum(sizes) if mean_over == "own_tokens" else len(inputs.rollouts)
    factors = {block: whole / count for block, count in own.items()}
    assert min(factors.values()) > 1.1
    found = world["optim"][mean_over.replace("_", " ")]
    check_moments(found["states"][1], reference().gradients(inputs.rollouts), factors, dict.fromkeys(ADAPTERS, BETAS))


class TestResume:
    def test_exact(self, world):
        one, other = (world["optim_resumed"][name] for name in ("uninterrupted", "resumed"))
        assert one["state"].keys() == other["state"].keys()
        assert all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())
        assert one["metrics"]["routing/lr/quarantine"] == other["metrics"]["routing/lr/quarantine"]

    def test_towards_another_start_is_refused(self, world):
        told = world["optim_resumed"]
        assert told["seed"].startswith("grad_routing.blocks.seed=1: the checkpoint's run has 0")
        assert told["decay_to_start"].startswith("grad_routing.blocks.optim.decay_to_start=False")
