"""Other forms of blocks in the real engine: exact gradients, starts, steps, exports and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.engine.reference import DEFAULT, Pair, Reference, block_norm, of_block, relative_error, same
from tests.engine.rollouts import ADAPTERS, ALPHA, PLAIN, RANKS, RICH
from tests.engine.scenarios_forms import FORMS, ON_POLICY, VARIANTS, drawn_parts
from verl_grad_routing.routing import get_form

pytestmark = pytest.mark.timeout(600)

GATES = {"joined": (1, 1), "deployed": (1, 0), "quarantine": (0, 1)}


class FormReference(Reference):
    """The slow account with another form's dense change, written out from the lineage's formula."""

    form: str

    def load(self, adapters) -> Reference:
        super().load(adapters)
        self.scaling /= get_form(self.form).sides
        return self

    def weights(self, gate: Pair) -> dict[str, Tensor]:
        dense = {}
        for name in self.adapters:
            module, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.default.")
            if found:
                delta = sum(
                    g * self.delta({p: self.part(name, p, a) for p in ("A", "B", *get_form(self.form).extra_parts)})
                    for g, a in zip(gate, ADAPTERS.values(), strict=True)
                )
                dense[f"{module}.weight"] = self.base_weights[f"{module}.weight"] + self.scaling * delta
        return dense

    def part(self, name: str, part: str, adapter: str) -> Tensor | None:
        return self.adapters.get(name.replace("lora_A.default", f"lora_{part}.{adapter}"))

    def delta(self, held: dict) -> Tensor:
        if self.form == "two_sided":
            return (held["B0"] + held["B"]) @ (held["A0"] + held["A"]) - held["B0"] @ held["A0"]
        rotation = torch.eye(len(held["gain"]), dtype=torch.float64)
        if held["turn"] is not None:
            K = held["turn"] - held["turn"].t()
            rotation = torch.linalg.inv(rotation + K) @ (rotation - K)
        return held["B"] @ torch.diag(held["gain"].tanh()) @ rotation @ held["A"]


@pytest.fixture(scope="module")
def slow(inputs) -> Callable[[str, str], Reference]:
    made: dict[str, Reference] = {}

    def one(form: str, ranks: str = "equal") -> Reference:
        if form not in made:
            cls = type(form, (FormReference,), {"form": form})
            made[form] = cls(inputs.model_dir, drawn_parts(inputs, form, ranks))
        return made[form].load(drawn_parts(inputs, form, ranks))

    return one


def trained(values, form: str):
    return {n: v for n, v in values.items() if n.split(".lora_")[1].split(".")[0] in get_form(form).trained}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", list(VARIANTS))
def test_gradients_are_the_sum_of_allowed_rollouts(form, name, world, slow, inputs):
    options, _, rich, tolerance = VARIANTS[name]
    own, rollouts = slow(form, options.get("ranks", "equal")), inputs.rollouts
    if name in ON_POLICY:
        gates = [DEFAULT[row.route][0] for row in rollouts]
        current = [own.log_probs(row, gate).detach().float() for row, gate in zip(rollouts, gates, strict=True)]
        rollouts = [replace(row, old_log_probs=probs) for row, probs in zip(rollouts, current, strict=True)]
    expected = trained(own.gradients(rollouts, RICH if rich else PLAIN), form)
    assert relative_error(world["form_gradients"][f"{form} {name}"], expected) < tolerance
    for block in ADAPTERS:
        assert block_norm(expected, block) > 0.01  # there is something to compare
    assert set(world["form_gradients"][f"{form} trains"]) == expected.keys()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", list(RANKS))
def test_it_starts_as_the_base_model_and_trains_what_it_should(form, ranks, world):
    found = world["form_starts"][f"{form} {ranks}"]
    base = found["log_probs"]["base"]
    for name in ("as it is", "ablated"):
        errors = [float((a - b).abs().max()) for a, b in zip(found["log_probs"][name], base, strict=True)]
        assert max(errors) < 1e-6
    for name, value in found["before"].items():
        moves = name in trained(found["before"], form) and ".lora_turn." not in name  # no gradient at gains of zero
        assert torch.equal(value, found["after"][name]) != moves, name
    for block in ADAPTERS:
        assert found["metrics"][f"routing/update_norm/{block}"] > 0


def test_two_ranks_start_as_one(worlds):
    for form in FORMS:
        one, two = (worlds(size)["form_starts"][f"{form} equal"]["before"] for size in (1, 2))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_that_trains_one_block_leaves_the_other_bitwise(form, world):
    start, flagged, clean = world["form_steps"][form]
    assert any(name.endswith("exp_avg") and value.abs().max() > 0 for name, value in start.items())
    for before, after, kept, moved in (
        (start, flagged, "deployed", "quarantine"),
        (flagged, clean, "quarantine", "deployed"),
    ):
        assert same(before, after, kept)
        assert all(
            not torch.equal(value, after[name]) for name, value in trained(of_block(before, moved), form).items()
        )


def plain_log_probs(model, row):
    with torch.no_grad():
        logits = model(row.tokens[None]).logits[0, len(row.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, row.response[:, None]).squeeze(-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", list(GATES))
class TestExports:
    def test_plain_peft_reproduces_the_engine(self, form, kind, world, slow, inputs):
        found, own = world["form_exports"][f"{form} {kind}"], slow(form, "unequal")
        sides = get_form(form).sides
        rank = sides * sum(rank * gate for rank, gate in zip(RANKS["unequal"], GATES[kind], strict=True))
        assert found["config"]["r"] == rank
        assert found["config"]["lora_alpha"] / rank == pytest.approx(ALPHA / sides / sum(RANKS["unequal"]))
        known = {field.name for field in fields(LoraConfig)}
        config = LoraConfig(**{key: value for key, value in found["config"].items() if key in known})
        model = get_peft_model(LlamaForCausalLM.from_pretrained(inputs.model_dir), config).eval()
        outcome = set_peft_model_state_dict(model, found["tensors"])
        assert not outcome.unexpected_keys and not any("lora_" in key for key in outcome.missing_keys)
        for index, row in enumerate(inputs.rollouts):
            have = plain_log_probs(model, row)
            assert (have - own.log_probs(row, GATES[kind])).abs().max() < 2e-5
            assert "log_probs" not in found or (have - found["log_probs"][index]).abs().max() < 2e-5

    def test_merged_weights_are_base_plus_blocks(self, form, kind, world, slow, inputs):
        found = world["form_exports"][f"{form} merged {kind}"]
        plain = LlamaForCausalLM.from_pretrained(inputs.model_dir).state_dict()
        assert found.keys() == plain.keys()
        changed = {name: value.detach() for name, value in slow(form, "unequal").weights(GATES[kind]).items()}
        for name, tensor in found.items():
            expected = {**plain, **changed}[name].double()
            assert ((tensor.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_base_is_exported_bare(form, world, inputs):
    plain = LlamaForCausalLM.from_pretrained(inputs.model_dir).state_dict()
    exported = world["form_exports"][f"{form} base"]
    assert {name.replace(".base_layer", "") for name in exported} == plain.keys()


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_brings_its_basis_along(form, world):
    found = world["form_checkpoints"][form]
    one, other = found["uninterrupted"], found["resumed"]
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    basis = [name for name in found["other"] if name not in trained(found["other"], form)]
    assert basis and all(not torch.equal(found["saved"][name], found["other"][name]) for name in basis)
    assert found["told"].startswith("grad_routing.blocks.form='lora'") and f"of the form {form};" in found["told"]
