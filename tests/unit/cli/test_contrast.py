"""``vgr contrast`` on a small model: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from verl_grad_routing import cli
from verl_grad_routing.routing import load_contrast
from verl_grad_routing.subspaces.basis import model_hash

pytestmark = pytest.mark.timeout(240)

PAIRS = [
    {"id": "one", "prompt": "NAabcde11111=", "unwanted": "11111~", "wanted": "abcde~"},
    {"id": "two", "prompt": "NApmcde22222=", "unwanted": "22222~", "wanted": "pmedc~"},
]


def run(*arguments: str) -> object:
    with pytest.raises(SystemExit) as stop:
        cli.main(["contrast", *arguments])
    return stop.value.code


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from tests.tiny import tiny_llama
    from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
    from verl_grad_routing.envs.loopholes.text import ALPHABET

    tokenizer, folder = build_tokenizer(ALPHABET), tmp_path / "model"
    tiny_llama(vocab_size=len(tokenizer), intermediate_size=24).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in PAIRS))
    return folder


def test_every_linear_layer_gets_a_row_a_pair(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = model.parent / "contrast.safetensors"
    assert run(str(model), "--pairs", str(model.parent / "pairs.jsonl"), "--to", str(to), "--device", "cpu") in (
        0,
        None,
    )
    found = load_contrast(to)
    assert "2 pairs of" in capsys.readouterr().out and found.origin["model_hash"] == model_hash(model)
    assert len(found.differences) == 14 and int(found.origin["linear_layers"]) == 14
    assert found.of("model.layers.1.mlp.down_proj", 24).shape == (2, 24)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    normed = network.model.layers[0].input_layernorm
    means = []
    for side in (PAIRS[1]["unwanted"], PAIRS[1]["wanted"]):
        ids = tokenizer(side, add_special_tokens=False)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id  # the sides end like rollouts
        means.append(normed(network.model.embed_tokens(torch.tensor(ids))).double().mean(0))
    # the first layer's query reads normalised embeddings, which no other token changes
    assert (found.of("model.layers.0.self_attn.q_proj", 16)[1] - (means[0] - means[1])).abs().max() < 1e-6


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path), "--pairs", "none.jsonl", "--to", str(tmp_path / "c.safetensors")) == 2
    assert "no config.json there" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert run(str(tmp_path), "--pairs", "none.jsonl", "--to", str(tmp_path / "c.safetensors")) == 2
    assert "no such file: none.jsonl" in capsys.readouterr().err
