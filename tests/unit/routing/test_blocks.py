"""Names, ranks and state dicts of the blocks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import (
    block_of,
    check_ranks,
    check_total_rank,
    deployed_only,
    join_blocks,
    joined_lora_config,
    split_blocks,
    vllm_ranks,
)

MODULE = "base_model.model.layers.0.self_attn.q_proj"


def state(r_d: int = 2, r_q: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    entries = {f"{MODULE}.base_layer.weight": draw(4, 5)}
    for name in (MODULE, MODULE.replace("q_proj", "v_proj")):
        for adapter, rank in (("quarantine", r_q), ("default", r_d)):  # whatever the order of the entries
            entries[f"{name}.lora_A.{adapter}.weight"] = draw(rank, 5)
            entries[f"{name}.lora_B.{adapter}.weight"] = draw(4, rank)
    return entries


def product(entries: dict[str, torch.Tensor], suffix: str = "") -> torch.Tensor:
    return entries[f"{MODULE}.lora_B{suffix}.weight"] @ entries[f"{MODULE}.lora_A{suffix}.weight"]


def test_the_joined_adapter_is_the_sum_of_both():
    entries = state()
    joined = join_blocks(entries)
    assert len(joined) == 4 and all("base_layer" not in name for name in joined)
    assert joined[f"{MODULE}.lora_A.weight"].shape == (5, 5) and joined[f"{MODULE}.lora_B.weight"].shape == (4, 5)
    expected = product(entries, ".default") + product(entries, ".quarantine")
    assert (product(joined) - expected).abs().max() < 1e-12
    assert torch.equal(joined[f"{MODULE}.lora_A.weight"][:2], entries[f"{MODULE}.lora_A.default.weight"])


def test_unequal_scalings_fold_into_B():
    entries = state()
    expected = 0.5 * product(entries, ".default") + 3.0 * product(entries, ".quarantine")
    assert (product(join_blocks(entries, scalings=(0.5, 3.0))) - expected).abs().max() < 1e-12


def test_split_is_the_inverse_of_join():
    entries = state()
    for adapter in (None, "default"):
        back = split_blocks(join_blocks(entries, adapter), 2)
        assert set(back) == {name for name in entries if ".lora_" in name}
        assert all(torch.equal(back[name], entries[name]) for name in back)


def test_deployed_only_drops_the_quarantine():
    entries = state()
    alone = deployed_only(entries, adapter="default")
    assert alone and all(torch.equal(tensor, entries[name]) for name, tensor in alone.items())
    assert not any("quarantine" in name for name in alone)


@pytest.mark.parametrize("function", [join_blocks, deployed_only])
def test_incomplete_or_foreign_states_are_refused(function):
    missing = state()
    del missing[f"{MODULE}.lora_B.quarantine.weight"]
    with pytest.raises(UserError, match="'quarantine' is missing"):
        function(missing)
    with pytest.raises(UserError, match="adapters"):
        function(state() | {f"{MODULE}.lora_A.third.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="none is a LoRA weight"):
        function({"weight": torch.zeros(1)})


def test_splitting_what_has_no_two_blocks_is_refused():
    joined = join_blocks(state())
    for rank in (0, 5):
        with pytest.raises(UserError, match="deployed_rank"):
            split_blocks(joined, rank)
    with pytest.raises(UserError, match=r"lora_A\.weight"):
        split_blocks({"weight": torch.zeros(1)}, 1)


def test_names_of_blocks():
    assert block_of(f"{MODULE}.lora_A.default.weight") == "deployed"
    assert block_of(f"{MODULE}.lora_B.quarantine.weight") == "quarantine"
    for other in (f"{MODULE}.base_layer.weight", f"{MODULE}.lora_A.third.weight", "lm_head.weight", ""):
        assert block_of(other) is None


@pytest.mark.parametrize(("total", "following"), [(0, 8), (1, 8), (2, 8), (9, 16), (17, 32), (33, 64), (400, 512)])
def test_totals_vllm_does_not_take_are_refused_with_the_next(total, following):
    with pytest.raises(UserError, match=f"use {following}, the next"):
        check_total_rank(total)


def test_totals_vllm_takes_pass():
    assert [check_total_rank(total) for total in vllm_ranks() if total > 1] == [8, 16, 32, 64, 128, 256, 320, 512]
    with pytest.raises(UserError, match="use 512, the largest"):
        check_total_rank(1024)


def test_the_list_is_vllms_own():
    """Read from vLLM's source, because importing it takes seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("needs vLLM")
    source = (Path(spec.origin).parent / "config" / "lora.py").read_text()
    literal = re.search(r"MaxLoRARanks = Literal\[([\d, ]+)\]", source)
    assert literal and vllm_ranks() == tuple(int(rank) for rank in literal[1].split(","))


@pytest.mark.parametrize("ranks", [(0, 8), (8, 0), (-1, 8), (2.0, 2), (True, 1)])
def test_empty_or_fractional_ranks_are_refused(ranks):
    with pytest.raises(UserError, match="integer of at least 1"):
        check_ranks(*ranks)
    assert check_ranks(3, 5) == 8


def test_joined_configuration_keeps_the_scaling():
    assert joined_lora_config(8, 8, 2.0) == {"r": 16, "lora_alpha": 32}
    values = joined_lora_config(3, 5, 0.7)
    assert values["lora_alpha"] / values["r"] == pytest.approx(0.7, rel=1e-15)
