"""A checkpoint with dense blocks becomes a plain model whose logits are the training model's, quarantine ablated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from verl_grad_routing.deploy import export
from verl_grad_routing.deploy.changes import checkpoint_basis
from verl_grad_routing.deploy.verify import largest_difference, logits_on, probe_tokens
from verl_grad_routing.errors import UserError

UNITS, HEADS = [0, 1, 2, 9], [2, 3]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request, tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        attention_bias=True,
        tie_word_embeddings=request.param,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    torch.manual_seed(1)
    trained = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    actor = folder / "global_step_3" / "actor"
    actor.mkdir(parents=True)
    torch.save(trained.state_dict(), actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"world_size": 1}))
    layout = {
        "kind": "dense",
        "units": {"layers": [1], "mlp_units": UNITS, "heads": HEADS},
        "shared": ["embeddings", "head"],
        "ablate_at_deployment": True,
        "base_model": str(folder / "base"),
    }
    (actor / "grad_routing_blocks.json").write_text(json.dumps(layout))
    return actor.parent, trained


def without_quarantine(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """By hand: heads 2 and 3 of size 4 are columns 8 to 15 and group 1."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = "model.layers.1"
    for name in ("gate_proj", "up_proj"):
        state[f"{layer}.mlp.{name}.weight"][UNITS] = 0
    state[f"{layer}.mlp.down_proj.weight"][:, UNITS] = 0
    for name, rows in (("q_proj", slice(8, 16)), ("k_proj", slice(4, 8)), ("v_proj", slice(4, 8))):
        for side in ("weight", "bias"):
            state[f"{layer}.self_attn.{name}.{side}"][rows] = 0
    state[f"{layer}.self_attn.o_proj.weight"][:, 8:16] = 0
    return state


@pytest.mark.parametrize("blocks", [None, "both"])
def test_files_hold_what_is_deployed(checkpoint, tmp_path, blocks):
    folder, trained = checkpoint
    done = export(folder, tmp_path / "out", format="hf", blocks=blocks)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = trained.state_dict() if blocks == "both" else without_quarantine(trained)
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    difference = largest_difference(logits_on(loaded, probe_tokens(loaded)), logits_on(trained, probe_tokens(trained)))
    assert done.quarantine_effect > 0.1
    assert difference == pytest.approx(0 if blocks == "both" else done.quarantine_effect, rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| quarantined MLP units | 0, 1, 2, 9 |" in card and ("are zero in these files" in card) == (blocks is None)


def test_an_adapter_cannot_hold_them(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"format='peft'.*hf"):
        export(checkpoint[0], tmp_path / "out", format="peft")
    with pytest.raises(UserError, match=r"no adapters"):
        checkpoint_basis(checkpoint[0], 2)


def test_another_base_model_is_refused(checkpoint, tmp_path):
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    other = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(other).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="CHECKPOINT"):
        export(checkpoint[0], tmp_path / "out", format="hf", base_model=str(tmp_path / "base"))


def test_units_alone_are_no_model(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"blocks='quarantine'.*deployed or both"):
        export(checkpoint[0], tmp_path / "out", format="hf", blocks="quarantine")
