"""Optimizer steps per block: frozen bitwise without tokens, clipped by the block's own norm, reported truthfully."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.engine.reference import all_moved, block_norm, of_block, same
from tests.engine.rollouts import ADAPTERS

pytestmark = pytest.mark.timeout(600)

CLIP, LR, DECAY, BETAS = 0.05, 1e-2, 0.1, (0.9, 0.999)


class TestFrozenBlocks:
    @pytest.mark.parametrize("setting", ["fp32", "padded", "bf16 checkpointed"])
    def test_a_batch_that_trains_one_block_leaves_the_other_bitwise(self, setting, world):
        start, routes, keeps, silent = world["freeze"][setting]["states"]
        assert any(name.endswith("exp_avg") and value.abs().max() > 0 for name, value in start.items())
        assert same(start, routes, "deployed") and all_moved(start, routes, "quarantine")
        assert same(routes, keeps, "quarantine") and all_moved(routes, keeps, "deployed")
        assert same(keeps, silent, "quarantine") and all_moved(keeps, silent, "deployed")

    def test_a_block_that_never_trained_has_no_optimizer_state(self, world, inputs):
        first = world["freeze"]["first step"]
        deployed = of_block(first, "deployed")
        assert deployed.keys() == of_block(inputs.adapters["equal"], "deployed").keys()
        assert all(torch.equal(value, inputs.adapters["equal"][name]) for name, value in deployed.items())
        assert any(name.endswith("exp_avg") for name in of_block(first, "quarantine"))

    def test_the_base_is_none_of_the_optimizers_business(self, world):
        groups = {name.split("/")[0] for name in world["freeze"]["fp32"]["states"][0]}
        assert all(".lora_" in name for name in groups)


class TestStep:
    """Two steps over the mixed batch against the reference's gradients and AdamW's own formula."""

    def moments(self, gradients, limits):
        clipped = {}
        for block, limit in limits.items():
            factor = min(1.0, limit / (block_norm(gradients, block) + 1e-6))
            clipped |= {name: value * factor for name, value in of_block(gradients, block).items()}
        return clipped

    @pytest.mark.parametrize("key", ["states", "own limits"])
    def test_each_block_is_clipped_by_its_own_norm(self, key, world, reference, inputs):
        found = world["two_steps"]
        state = found["states"][1] if key == "states" else found[key]
        limits = dict.fromkeys(ADAPTERS, CLIP) if key == "states" else {"deployed": 0.02, "quarantine": 1e6}
        for name, gradient in self.moments(reference().gradients(inputs.rollouts), limits).items():
            for moment, expected in (("exp_avg", 0.1 * gradient), ("exp_avg_sq", 0.001 * gradient**2)):
                actual = state[f"{name}/{moment}"]
                assert (actual - expected).abs().max() < 3e-5 * expected.abs().max()

    def test_parameters_move_as_adamw_says(self, world):
        states = world["two_steps"]["states"]
        for number, (before, after) in enumerate(itertools.pairwise(states), start=1):
            for name in states[0]:
                mean, square = (after[f"{name}/{key}"].double() for key in ("exp_avg", "exp_avg_sq"))
                assert after[f"{name}/step"] == number
                direction = (mean / (1 - BETAS[0] ** number)) / ((square / (1 - BETAS[1] ** number)).sqrt() + 1e-8)
                expected = before[name].double() * (1 - LR * DECAY) - LR * direction
                assert (after[name] - expected).abs().max() < 1e-6

    def test_metrics_are_the_reference_and_the_actual_change(self, world, reference, inputs):
        found = world["two_steps"]
        gradients = reference().gradients(inputs.rollouts)
        tokens = {
            route: sum(int(row.mask.sum()) for row in inputs.rollouts if row.route == route) for route in range(3)
        }
        metrics = found["metrics"][0]
        assert metrics["routing/mass_deployed"] == tokens[0] + tokens[1]
        assert metrics["routing/mass_quarantine"] == tokens[1] + tokens[2]
        norms = {block: block_norm(gradients, block) for block in ADAPTERS}
        for block, norm in norms.items():
            assert metrics[f"routing/grad_norm/{block}"] == pytest.approx(norm, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(math.hypot(*norms.values()), rel=1e-5)
        share = norms["quarantine"] / sum(norms.values())
        assert metrics["routing/grad_share/quarantine"] == pytest.approx(share, rel=1e-5)
        for step in (0, 1):
            before, after = found["states"][step], found["states"][step + 1]
            change = {name: after[name] - before[name] for name in found["states"][0]}
            updates = {block: block_norm(change, block) for block in ADAPTERS}
            share = updates["quarantine"] / sum(updates.values())
            assert found["metrics"][step]["routing/update_share/quarantine"] == pytest.approx(share, rel=1e-5)
            for block in ADAPTERS:
                reported = found["metrics"][step][f"routing/update_norm/{block}"]
                assert reported == pytest.approx(updates[block], rel=1e-5)

    def test_replicas_are_not_counted_twice(self, worlds):
        found = worlds(2)["two_steps"]
        for key in (
            "grad_norm",
            *(f"routing/{kind}_norm/{block}" for kind in ("grad", "update") for block in ADAPTERS),
        ):
            assert found["replicated"]["metrics"][key] == pytest.approx(found["metrics"][0][key], rel=1e-5)
        moments = [name for name in found["states"][1] if name.endswith("exp_avg")]
        for name in moments:
            assert torch.allclose(found["replicated"]["state"][name], found["states"][1][name], rtol=1e-3, atol=1e-8)

    def test_a_huge_quarantine_gradient_does_not_touch_the_deployed_update(self, world):
        quiet, loud = world["shared_clip"]["quiet"], world["shared_clip"]["loud"]
        assert loud["metrics"]["routing/grad_norm/quarantine"] > 100 * quiet["metrics"]["routing/grad_norm/quarantine"]
        assert quiet["metrics"]["routing/grad_norm/deployed"] > 1.0  # so that a shared norm would clip it further
        assert same(quiet["state"], loud["state"], "deployed")
        assert not same(quiet["state"], loud["state"], "quarantine")

    def test_clipping_and_momentum_by_hand(self, worlds):
        """Norms .3 and 4 under a limit of 1: a shared norm would leave the deployed block .0748 instead of .3."""
        found = worlds(1)["block_step_oracles"]
        assert found["clipped"]["deployed"].tolist() == pytest.approx([-0.3, 0.0])
        assert found["clipped"]["quarantine"].tolist() == pytest.approx([0.0, -1.0], abs=1e-6)
        assert found["clipped"]["total"] == pytest.approx(math.hypot(0.3, 4.0))
        # AdamW, lr .1, decay .1: a step, none without mass, and with mass but no gradient momentum moves it on
        assert found["trajectory"] == pytest.approx([0.89, 0.89, 0.8132352], abs=1e-6)


class TestMass:
    def test_zero_advantages_still_step_as_verl_would(self, world):
        case = world["mass"]["advantages zero"]
        assert case["metrics"]["grad_norm"] == 0
        for name in [name for name in case["before"] if name.endswith(".weight")]:
            parameter = torch.nn.Parameter(case["before"][name].clone())
            optimizer = torch.optim.AdamW([parameter], lr=LR, betas=BETAS, weight_decay=DECAY)
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {key: case["before"][f"{name}/{key}"].clone() for key in keys}
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            assert torch.allclose(case["after"][name], parameter, rtol=1e-6, atol=1e-8)
            assert not torch.equal(case["after"][name], case["before"][name])

    @pytest.mark.parametrize("case", ["no tokens", "weights zero"])
    def test_without_tokens_nothing_is_stepped(self, case, world):
        found = world["mass"][case]
        assert found["metrics"]["routing/mass_deployed"] == found["metrics"]["routing/mass_quarantine"] == 0
        for block in ADAPTERS:
            assert same(found["before"], found["after"], block)
            assert found["metrics"][f"routing/update_norm/{block}"] == 0

    def test_weights_scale_the_mass(self, world, inputs):
        tokens = {
            route: sum(int(row.mask.sum()) for row in inputs.rollouts if row.route == route) for route in range(3)
        }
        metrics = world["mass"]["half weights"]["metrics"]
        assert metrics["routing/mass_deployed"] == pytest.approx(0.5 * (tokens[0] + tokens[1]))
        assert metrics["routing/mass_quarantine"] == pytest.approx(0.5 * tokens[1])

    def test_flagged_rows_without_weight_do_not_step_the_quarantine(self, world):
        found = world["mass"]["flagged weights zero"]
        assert found["metrics"]["routing/mass_quarantine"] == 0 < found["metrics"]["routing/mass_deployed"]
        assert same(found["before"], found["after"], "quarantine")
        assert all_moved(found["before"], found["after"], "deployed")


class TestRefusedUpdates:
    @pytest.mark.parametrize("block", ["deployed", "quarantine"])
    def test_a_gradient_that_is_no_number_skips_the_whole_update(self, block, world):
        found = world["not_finite"][block]
        assert not math.isfinite(found["metrics"]["grad_norm"])
        for name in ADAPTERS:
            assert same(found["before"], found["after"], name)
            assert found["metrics"][f"routing/update_norm/{name}"] == 0

    @pytest.mark.parametrize("block", ["deployed", "quarantine"])
    def test_nor_is_the_other_block_stepped(self, block, worlds):
        before, after = worlds(1)["block_step_oracles"]["poisoned"][block]
        assert before == after

    def test_the_next_step_is_an_ordinary_one(self, world):
        found = world["not_finite"]
        assert all(same(found["control"], found["recovered"], block) for block in ADAPTERS)

    def test_a_batch_without_routes_is_refused(self, world):
        told = world["refusals"]
        for key in ("route", "routing_table"):
            assert told[key][0] == "route" and "route" in told[key][1]
        assert told["unknown"][0] == "route" and "3" in told["unknown"][1]
