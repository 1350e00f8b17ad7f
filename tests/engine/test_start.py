"""Bases of the base weights in the engine: on one rank and on two, where only the first has weights at that point."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.engine.rollouts import RANKS
from tests.engine.scenarios_start import FROM_PAIRS, drawn_contrast

pytestmark = pytest.mark.timeout(600)

ROW_NORM = 1 / math.sqrt(3)


@pytest.mark.parametrize("ranks", list(RANKS))
def test_blocks_are_the_singular_vectors_of_the_base_weights(ranks, world, inputs):
    found = world["start"][ranks]["parameters"]
    base = dict(LlamaForCausalLM.from_pretrained(inputs.model_dir).named_parameters())
    assert len(found) == 4 * 7 * 3  # A and B of two blocks, seven layers in each of three
    for name, value in found.items():
        module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if rest.startswith("B"):
            assert not value.any()
            continue
        rank, first = len(value), int("quarantine" in rest)
        vectors = torch.linalg.svd(base[f"{module}.weight"].double())[2][first : 2 * rank : 2]
        assert value.shape == vectors.shape
        cosines = (value.double() * vectors).sum(1) / ROW_NORM
        assert (cosines.abs() - 1).abs().max() < 1e-6
        assert (value.gather(1, value.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("ranks", list(RANKS))
def test_the_model_is_the_base_model_and_trains(ranks, world, inputs):
    found = world["start"][ranks]
    plain = LlamaForCausalLM.from_pretrained(inputs.model_dir)
    for row, have in zip(inputs.rollouts, found["log_probs"], strict=True):
        with torch.no_grad():
            logits = plain(row.tokens[None]).logits[0, len(row.prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(-1, row.response[:, None]).squeeze(-1)
        assert (have - want).abs().max() < 2e-5
    for name, value in found["stepped"].items():
        assert torch.isfinite(value).all()
        assert ".lora_A." in name or value.any()
    assert found["metrics"]["routing/update_norm/quarantine"] > 0


def test_two_ranks_start_as_one(worlds):
    for ranks in RANKS:
        one, two = (worlds(size)["start"][ranks]["parameters"] for size in (1, 2))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class TestFromPairs:
    @pytest.mark.parametrize("init", FROM_PAIRS)
    def test_the_model_is_the_base_model_and_rows_are_matched(self, init, world, inputs):
        found = world["start_from_pairs"][init]
        plain = world["start"]["equal"]["log_probs"]
        assert max(float((a - b).abs().max()) for a, b in zip(found["log_probs"], plain, strict=True)) < 1e-6
        for name, value in found["parameters"].items():
            if ".lora_B." in name:
                assert not value.any()
            elif ".default." in name:
                other = found["parameters"][name.replace(".default.", ".quarantine.")]
                assert (value @ other.t()).abs().max() < 1e-6
                assert (torch.cat((value, other)).norm(dim=1) - ROW_NORM).abs().max() < 1e-6

    def test_the_seed_is_the_mean_difference_in_one_block(self, world, inputs):
        """And in the other block for the reversed control."""
        contrast = drawn_contrast(inputs)
        for init, adapter, other in (("scorda", "quarantine", "default"), ("scorda_rev", "default", "quarantine")):
            found = world["start_from_pairs"][init]["parameters"]
            for module, difference_PI in contrast.items():
                unit = torch.nn.functional.normalize(difference_PI.mean(0), dim=0)
                names = (f"base_model.model.{module}.lora_A.{adapter}.weight" for adapter in (adapter, other))
                seeded, free = (found[name] for name in names)
                assert float(seeded[0] @ unit) == pytest.approx(ROW_NORM, rel=1e-5)
                assert (free @ unit).abs().max() < 1e-6

    def test_two_ranks_start_as_one(self, worlds):
        for init in FROM_PAIRS:
            one, two = (worlds(size)["start_from_pairs"][init]["parameters"] for size in (1, 2))
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    def test_a_resumed_run_goes_on_exactly(self, world):
        one, other = world["start_from_pairs"]["uninterrupted"], world["start_from_pairs"]["resumed"]
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    def test_a_contrast_of_another_model_is_refused_on_every_rank(self, world):
        assert "no layer model.layers.0.self_attn.q_proj: made on another model" in world["start_from_pairs"]["told"]
