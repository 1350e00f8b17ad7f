"""A checkpoint with dense blocks becomes a plain model whose logits are the training model's, quarantine ablated."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.unit.deploy.conftest import DENSE_UNITS as UNITS
from verl_grad_routing.deploy import export
from verl_grad_routing.deploy.changes import checkpoint_basis
from verl_grad_routing.deploy.verify import largest_difference, logits_on, probe_tokens
from verl_grad_routing.errors import UserError


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
def test_files_hold_what_is_deployed(dense_checkpoint, tmp_path, blocks):
    folder, trained = dense_checkpoint
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


def test_an_adapter_cannot_hold_them(dense_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"format='peft'.*hf"):
        export(dense_checkpoint[0], tmp_path / "out", format="peft")
    with pytest.raises(UserError, match=r"no adapters"):
        checkpoint_basis(dense_checkpoint[0], 2)


def test_another_base_model_is_refused(dense_checkpoint, tmp_path):
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    other = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(other).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="CHECKPOINT"):
        export(dense_checkpoint[0], tmp_path / "out", format="hf", base_model=str(tmp_path / "base"))


def test_units_alone_are_no_model(dense_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"blocks='quarantine'.*deployed or both"):
        export(dense_checkpoint[0], tmp_path / "out", format="hf", blocks="quarantine")
