"""Dense blocks in verl's FSDP2 engine, on one and two ranks, against the single-process reference."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.engine import dense_reference as tables
from tests.engine.dense_reference import Adam, DenseReference, quarantine_of
from tests.engine.rollouts import KEEP, PLAIN, RICH, ROUTE, routed

pytestmark = pytest.mark.timeout(600)

CLIP = 0.05
NOT_BLOCKS = ("embed_tokens", "lm_head", "norm", "o_proj.bias")


def outside(name: str) -> bool:
    """SGTM's ``joint`` parameters where only activations are masked; layer 1 carries no quarantine."""
    return any(part in name for part in NOT_BLOCKS) or "layers.1." in name


CASES = {
    "plain": (PLAIN, tables.PARAMETER_MASKING, False, lambda name: False),
    "padded": (RICH, tables.PARAMETER_MASKING, False, lambda name: False),
    "dynamic": (RICH, tables.PARAMETER_MASKING, False, lambda name: False),
    "checkpointed": (PLAIN, tables.PARAMETER_MASKING, False, lambda name: False),
    "weights": (PLAIN, tables.PARAMETER_MASKING, True, lambda name: "norm" in name),
    "shared": (PLAIN, tables.PARAMETER_MASKING, False, lambda name: any(part in name for part in NOT_BLOCKS)),
    "reduced every time": (PLAIN, tables.PARAMETER_MASKING, False, lambda name: False),
    "gradient routing": (PLAIN, tables.GRADIENT_ROUTING, False, lambda name: False),
    "activation masking": (PLAIN, tables.ACTIVATION_MASKING, False, outside),
    "cloud": (PLAIN, tables.CLOUD, False, lambda name: False),
    "gradient routing, checkpointed": (PLAIN, tables.GRADIENT_ROUTING, False, lambda name: False),
    "activation masking, checkpointed": (PLAIN, tables.ACTIVATION_MASKING, False, outside),
    "cloud, checkpointed": (PLAIN, tables.CLOUD, False, lambda name: False),
    "cloud, weights of units": (PLAIN, tables.CLOUD, False, lambda name: False),
    "bf16": (PLAIN, tables.PARAMETER_MASKING, False, lambda name: False),
}


def error(actual, expected) -> float:
    assert actual.keys() == expected.keys()
    return max(
        float((actual[name].double() - value).norm() / value.norm().clamp(min=1e-3)) for name, value in expected.items()
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_sum_of_allowed_rollouts(case, world, inputs):
    loss, table, weighted, shared = CASES[case]
    reference = DenseReference(inputs.model_dir)
    reference.weighed = "weights of units" in case
    expected = reference.gradients(inputs.rollouts, loss, table, weighted, shared)
    assert error(world["dense_gradients"][case], expected) < (0.2 if case == "bf16" else 1e-5)


def same(before, after) -> bool:
    return before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def moved(before, after) -> bool:
    return all(not torch.equal(value, after[name]) for name, value in before.items() if value.any())


class TestSteps:
    def test_a_block_without_mass_is_left_alone_bit_for_bit(self, world):
        states = world["dense_steps"]["states"]
        for step, still, moves in ((3, "deployed", "quarantine"), (4, "quarantine", "deployed")):
            assert same(states[step - 1][still], states[step][still])
            assert moved(states[step - 1][moves], states[step][moves])
            assert any(name.endswith("exp_avg") for name in states[step][still])

    def test_each_block_is_adam_with_its_own_clip_and_count(self, world, inputs):
        found, own = world["dense_steps"], DenseReference(inputs.model_dir)
        adam = Adam(own, lr=1e-2, decay=0.1, clip=CLIP)
        kinds = (None, None, ROUTE, KEEP, None)
        for index, kind in enumerate(kinds):
            rows = inputs.rollouts if kind is None else routed(inputs.rollouts, kind)
            norms = adam.step(own.gradients(rows), (kind != ROUTE, kind != KEEP))
            metrics = found["metrics"][index]
            for block, norm in zip(("deployed", "quarantine"), norms, strict=True):
                assert metrics[f"routing/grad_norm/{block}"] == pytest.approx(norm, rel=1e-3, abs=1e-9)
            for name, value in own.values.items():
                # Adam divides by the gradient's own size, so rounding is large where gradients are tiny
                off = (found["values"][index][name].double() - value).abs() > 2e-4
                assert off.float().mean() < 0.01, (index, name)

    def test_what_is_shared_learns_from_flagged_rollouts(self, world):
        before, after = world["dense_steps"]["shared"]
        assert same(before["deployed"], after["deployed"]) and before["shared"].keys() <= after["shared"].keys()
        assert moved(before["shared"], after["shared"])


LR = 1e-2
APART = {
    "own rates and moments": {"lr": (LR, 3 * LR), "decay": (0.4, 0.1), "betas": (tables.BETAS, (0.5, 0.9))},
    "towards the start": {"lr": LR, "decay": (0.1, 2.0), "to_start": True},
    "jointly": {"lr": LR, "decay": 0.1, "jointly": True},
    "inactive stepped": {"lr": LR, "decay": 0.1},
}


@pytest.mark.parametrize("name", APART)
def test_blocks_are_optimised_apart(name, world, inputs):
    own = DenseReference(inputs.model_dir)
    adam = Adam(own, clip=CLIP, **APART[name])
    for index, kind in enumerate((None, ROUTE, None)):
        rows = inputs.rollouts if kind is None else routed(inputs.rollouts, kind)
        adam.step(own.gradients(rows), (kind != ROUTE or name == "inactive stepped", True))
        for parameter, value in own.values.items():
            off = (world["dense_optim"][name][index][parameter].double() - value).abs() > 5e-4
            assert off.float().mean() < 0.01, (index, parameter)


def test_what_is_shared_takes_its_own_betas_and_decay(world):
    each, of_actor, blocks_alone = (world["dense_optim"][name] for name in ("each alone", "actor's", "blocks alone"))
    assert all(same(each[block], of_actor[block]) for block in ("deployed", "quarantine", "shared"))
    means = [name for name in each["shared"] if name.endswith(" exp_avg")]
    assert means and not any(torch.equal(each["shared"][name], blocks_alone["shared"][name]) for name in means)


def test_a_run_that_decays_towards_its_start_is_not_resumed_as_another(world):
    assert world["dense_optim"]["refused"].startswith("grad_routing.blocks.optim.decay_to_start=True: the checkpoint's")


def plain_log_probs(model, row):
    with torch.no_grad():
        logits = model(row.tokens[None]).logits[0, len(row.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, row.response[:, None]).squeeze(-1)


class TestExport:
    def test_weights_are_the_parameters_and_the_quarantine_is_zero_in_what_is_deployed(self, world):
        found = world["dense_export"]
        for name, value in found["trained"].items():
            assert torch.equal(found["both"][name], value) and torch.equal(found["again"][name], value)
            flags = quarantine_of(name, value.shape).bool()
            assert torch.equal(found["deployed"][name], value.masked_fill(flags, 0))
        assert "deployed alone" in found["refused"]

    @pytest.mark.parametrize(("view", "exported"), [("plain", "both"), ("ablated", "deployed")])
    def test_plain_transformers_reproduces_the_engine(self, view, exported, world, inputs):
        found = world["dense_export"]
        model = LlamaForCausalLM.from_pretrained(inputs.model_dir)
        model.load_state_dict(found[exported], strict=True)
        for row, have in zip(inputs.rollouts, found["log_probs"][view], strict=True):
            assert (plain_log_probs(model, row) - have).abs().max() < 2e-5

    def test_trusted_rollouts_see_the_model_without_quarantine(self, world, inputs):
        found = world["dense_export"]["log_probs"]
        for row, gated, plain, ablated in zip(
            inputs.rollouts, found["gated"], found["plain"], found["ablated"], strict=True
        ):
            assert (gated - (ablated if row.route == KEEP else plain)).abs().max() < 2e-5
        assert max(float((a - b).abs().max()) for a, b in zip(found["plain"], found["ablated"], strict=True)) > 0.1


def test_a_resumed_run_is_the_uninterrupted_one(world):
    found = world["dense_checkpoint"]
    for block in ("deployed", "quarantine"):
        assert same(found["saved"][block], found["loaded"][block])
        assert same(found["on"][block], found["resumed"][block])
    assert found["refused"].startswith("grad_routing.blocks.shared=['norms']")
