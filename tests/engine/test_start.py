"""``pissa_split`` in the engine: on one rank and on two, where only the first has the base weights at that point."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.engine.rollouts import RANKS

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
