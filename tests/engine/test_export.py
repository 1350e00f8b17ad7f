"""Exports load in plain PEFT and transformers and give the engine's own log-probs; checkpoints resume exactly."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from transformers import LlamaForCausalLM

from tests.engine.reference import relative_error
from tests.engine.rollouts import ALPHA, RANKS

pytestmark = pytest.mark.timeout(600)

GATES = {"joined": (1, 1), "deployed": (1, 0), "quarantine": (0, 1)}
KINDS = [(ranks, kind) for ranks in RANKS for kind in GATES]


def plain_log_probs(model, row):
    with torch.no_grad():
        logits = model(row.tokens[None]).logits[0, len(row.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, row.response[:, None]).squeeze(-1)


class TestAdapter:
    @pytest.mark.parametrize(("ranks", "kind"), KINDS)
    def test_tensors_are_the_parameters(self, ranks, kind, world, inputs):
        values, tensors = inputs.adapters[ranks], world["export"][f"{ranks} {kind}"]["tensors"]
        modules = {name.split(".lora_")[0] for name in values}
        assert tensors.keys() == {f"{module}.lora_{side}.weight" for module in modules for side in "AB"}
        for name, tensor in tensors.items():
            parts = [values[name.replace(".weight", f".{adapter}.weight")] for adapter in ("default", "quarantine")]
            chosen = [part for part, gate in zip(parts, GATES[kind], strict=True) if gate]
            assert torch.equal(tensor, torch.cat(chosen, dim=0 if ".lora_A." in name else 1))

    @pytest.mark.parametrize(("ranks", "kind"), KINDS)
    def test_plain_peft_reproduces_the_engine(self, ranks, kind, world, reference, inputs):
        found, own = world["export"][f"{ranks} {kind}"], reference(ranks)
        rank = sum(rank * gate for rank, gate in zip(RANKS[ranks], GATES[kind], strict=True))
        assert found["config"]["r"] == rank
        assert found["config"]["lora_alpha"] / rank == pytest.approx(ALPHA / sum(RANKS[ranks]))
        known = {field.name for field in fields(LoraConfig)}
        config = LoraConfig(**{key: value for key, value in found["config"].items() if key in known})
        model = get_peft_model(LlamaForCausalLM.from_pretrained(inputs.model_dir), config).eval()
        outcome = set_peft_model_state_dict(model, found["tensors"])
        assert not outcome.unexpected_keys
        assert not any("lora_" in key for key in outcome.missing_keys)
        for index, row in enumerate(inputs.rollouts):
            have = plain_log_probs(model, row)
            assert (have - own.log_probs(row, GATES[kind])).abs().max() < 2e-5
            assert "log_probs" not in found or (have - found["log_probs"][index]).abs().max() < 2e-5

    @pytest.mark.parametrize("ranks", list(RANKS))
    def test_the_base_is_exported_bare(self, ranks, world, inputs):
        plain = LlamaForCausalLM.from_pretrained(inputs.model_dir).state_dict()
        exported = world["export"][f"{ranks} base"]
        assert {name.replace(".base_layer", "") for name in exported} == plain.keys()
        assert all(torch.equal(value, plain[name.replace(".base_layer", "")]) for name, value in exported.items())

    def test_exporting_changes_nothing(self, world, inputs):
        for ranks in RANKS:
            kept = world["export"][f"{ranks} kept"]
            assert all(torch.equal(value, inputs.adapters[ranks][name]) for name, value in kept.items())


class TestMerged:
    @pytest.mark.parametrize(("kind", "gate"), [*GATES.items(), ("again", (1, 1))])
    def test_weights_are_base_plus_blocks(self, kind, gate, world, reference, inputs):
        found, own = world["merged"], reference()
        plain = LlamaForCausalLM.from_pretrained(inputs.model_dir)
        assert found[kind].keys() == plain.state_dict().keys() and found[f"{kind} config"] is None
        expected = {**plain.state_dict(), **{name: value.detach() for name, value in own.weights(gate).items()}}
        for name, tensor in found[kind].items():
            assert tensor.dtype == torch.bfloat16
            error = (tensor.double() - expected[name].double()).abs()
            assert (error <= expected[name].double().abs() * 2**-8 + 1e-6).all()  # half a unit of bf16's last place

    @pytest.mark.parametrize(("kind", "gate"), GATES.items())
    def test_plain_transformers_reproduces_the_engine(self, kind, gate, world, reference, inputs):
        model = LlamaForCausalLM.from_pretrained(inputs.model_dir)
        model.load_state_dict(world["merged"][kind], strict=True)
        have = [plain_log_probs(model, row).double() for row in inputs.rollouts]
        errors = {}
        for other in GATES.values():
            wanted = [reference().log_probs(row, other) for row in inputs.rollouts]
            errors[other] = max(float((a - b).detach().abs().mean()) for a, b in zip(have, wanted, strict=True))
        assert errors.pop(gate) < 0.05 < min(errors.values())

    def test_the_engine_is_as_before(self, world, reference, inputs):
        found = world["merged"]
        for key in ("states", "base"):
            first, *others = found[key]
            assert all(torch.equal(first[name], other[name]) for other in others for name in first)
        first, *others = found["log_probs"]
        assert all(all(map(torch.equal, first, other)) for other in others)
        assert relative_error(found["gradients"], reference().gradients(inputs.rollouts)) < 1e-5


class TestCheckpoint:
    @pytest.mark.parametrize("run", ["mixed", "quarantine never stepped", "adapters only"])
    def test_a_resumed_run_is_the_uninterrupted_one(self, run, world):
        found = world["checkpoint"][run]
        for one, other in (("saved", "loaded"), ("uninterrupted", "resumed")):
            assert found[one].keys() == found[other].keys()
            assert all(torch.equal(value, found[other][name]) for name, value in found[one].items())
        assert found["steps of the schedule"] == 2
        stepped = any(".quarantine." in name and name.endswith("exp_avg") for name in found["saved"])
        assert stepped == (run != "quarantine never stepped")

    def test_another_layout_is_refused(self, world):
        told = world["checkpoint"]["refusals"]
        assert (
            told["deployed_rank"].startswith("grad_routing.blocks.deployed_rank=5") and "has 4" in told["deployed_rank"]
        )
        assert told["scaling"].startswith("grad_routing.blocks.scaling=")
        assert told["target_modules"].startswith("grad_routing.blocks.target_modules=['q_proj']")
        assert told["none"].startswith("trainer.resume_from_path=") and "without blocks" in told["none"]

    def test_the_layout_is_beside_the_weights(self, world, inputs):
        layout = world["checkpoint"]["refusals"]["layout"]
        assert (layout["deployed_rank"], layout["quarantine_rank"]) == RANKS["equal"]
        assert layout["scaling"] == ALPHA / 8 and layout["base_model"] == str(inputs.model_dir)
