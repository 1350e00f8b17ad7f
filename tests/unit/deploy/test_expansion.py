"""``vgr expand`` writes an ordinary model, and ``vgr export`` makes the original one of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from verl_grad_routing.cli import main
from verl_grad_routing.deploy import export
from verl_grad_routing.deploy.expansion import Expand, expand
from verl_grad_routing.deploy.verify import largest_difference, logits_on, probe_tokens
from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
from verl_grad_routing.envs.loopholes.text import ALPHABET
from verl_grad_routing.errors import UserError
from verl_grad_routing.retain import Retain, retain
from verl_grad_routing.retain.kinds import KINDS
from verl_grad_routing.routing.dense import EXPANDED, Shape, UnitsConfig
from verl_grad_routing.routing.dense.expansion import KEY

UNITS, NEW = 12, 6


def write_model(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": UNITS, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
    config = LlamaConfig(**{**sizes, **heads, "mlp_bias": True, "initializer_range": 0.4, **more})
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("of the original")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", tie_word_embeddings=True)


def load(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def write_checkpoint(folder: Path, model: Path, state: dict[str, torch.Tensor]) -> Path:
    """As the engine writes it, in a run with the preset ``era``."""
    actor = folder / "global_step_3" / "actor"
    actor.mkdir(parents=True)
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"world_size": 1}))
    shape = Shape.of_folder(model)
    units = UnitsConfig(EXPANDED, shared=("embeddings", "head")).resolve(shape).as_layout()
    layout = {"kind": "dense", "shared": units.pop("shared"), "units": units, "ablate_at_deployment": True}
    assert shape.expansion is not None
    layout |= {"base_model": str(model), "expansion": shape.expansion.as_record()}
    (actor / "grad_routing_blocks.json").write_text(json.dumps(layout))
    return actor.parent


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestExpand:
    def test_an_ordinary_model_that_computes_the_same(self, base, tmp_path, capsys):
        arguments = ["--mlp-units", str(NEW), "--layers", "0,2", "--to", str(tmp_path / "wide")]
        with pytest.raises(SystemExit) as ended:
            main(["expand", str(base), *arguments])
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert "intermediate size 12 + 6 = 18" in told and "units 12 to 17 are new in layers 0, 2" in told
        config = AutoConfig.from_pretrained(tmp_path / "wide")
        assert config.intermediate_size == 18
        record = {"original": 12, "units": 6, "layers": [0, 2], "out_side": "zero", "std": None, "seed": 0}
        assert getattr(config, KEY) == record
        model, wide = load(base), load(tmp_path / "wide")
        probes = probe_tokens(model)
        assert largest_difference(logits_on(model, probes), logits_on(wide, probes)) < 1e-5
        assert files(tmp_path / "wide") == files(base) - {"README.md"}

    def test_random_on_both_sides_as_in_the_papers_code(self, base, tmp_path):
        done = expand(Expand(base, NEW, out_side="random", std=0.8 / 16**0.5, seed=3), tmp_path / "wide")
        down = load(tmp_path / "wide").model.layers[1].mlp.down_proj.weight[:, UNITS:]
        assert done.expansion.layers == (0, 1, 2) and done.difference > 0.1 and down.all()

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"mlp_units": 0}, "--mlp-units=0: give at least 1"),
            ({"layers": "0-3"}, "--layers='0-3': the model has layers 0 to 2"),
            ({"layers": "first"}, "--layers='first': give a number"),
            ({"out_side": "small"}, "--out-side='small': give zero or random"),
            ({"std": float("nan")}, "--std=nan: give a positive number"),
        ],
        ids=str,
    )
    def test_bad_settings(self, base, tmp_path, settings, told):
        with pytest.raises(UserError) as caught:
            expand(Expand(**{"model": base, "mlp_units": NEW, **settings}), tmp_path / "wide")
        assert told in str(caught.value) and not (tmp_path / "wide").exists()

    def test_a_model_that_cannot_be(self, base, tmp_path):
        (tmp_path / "none").mkdir()
        GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
        expand(Expand(base, NEW), tmp_path / "wide")
        config = json.loads((base / "config.json").read_text())
        (tmp_path / "quantised").mkdir()
        config["quantization_config"] = {"quant_method": "fp8"}
        (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
        for model, told in {
            "none": "no config.json there",
            "gpt2": "intermediate_size|num_hidden_layers",
            "wide": "has 6 new units already",
            "quantised": "has a quantization_config",
        }.items():
            with pytest.raises(UserError, match=told):
                expand(Expand(tmp_path / model, NEW), tmp_path / "to")
        with pytest.raises(UserError, match=r"--to.*is there already"):
            expand(Expand(base, NEW), tmp_path / "wide")

    def test_experts_are_no_mlp(self, tmp_path):
        from transformers import MixtralConfig, MixtralForCausalLM

        sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
        MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
        with pytest.raises(UserError, match=r"MODEL=.*Llama's kind"):
            expand(Expand(tmp_path / "moe", NEW), tmp_path / "to")


class TestContract:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_expand_then_export_is_the_original_model(self, tmp_path, tied, dtype):
        """Bit for bit in every weight, and so in every logit."""
        base = write_model(tmp_path / "base", dtype, tie_word_embeddings=tied)
        expand(Expand(base, NEW, "1-2", "random"), tmp_path / "wide")
        state = load(tmp_path / "wide").state_dict()
        done = export(write_checkpoint(tmp_path, tmp_path / "wide", state), tmp_path / "out", "hf")
        original, contracted = load(base, "auto"), load(tmp_path / "out", "auto")
        assert done.quarantine_effect > 0.1 and contracted.dtype == dtype
        assert contracted.state_dict().keys() == original.state_dict().keys()
        assert all(torch.equal(value, contracted.state_dict()[n]) for n, value in original.state_dict().items())
        one, other = ({**model.config.to_dict(), "_name_or_path": ""} for model in (original, contracted))
        assert one == other and KEY not in (tmp_path / "out" / "config.json").read_text()
        probes = probe_tokens(original)
        assert largest_difference(logits_on(original, probes), logits_on(contracted, probes)) == 0

    def test_what_was_trained_without_what_was_routed(self, base, tmp_path):
        expand(Expand(base, NEW, "0,2"), tmp_path / "wide")
        trained, generator = load(tmp_path / "wide"), torch.Generator().manual_seed(1)
        padding = trained.model.layers[1].mlp
        with torch.no_grad():
            for p in trained.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
            for p in (padding.gate_proj.weight, padding.up_proj.weight, padding.gate_proj.bias, padding.up_proj.bias):
                p[UNITS:] = 0
            padding.down_proj.weight[:, UNITS:] = 0
        checkpoint = write_checkpoint(tmp_path, tmp_path / "wide", trained.state_dict())
        done = export(checkpoint, tmp_path / "out", "hf")
        deployed, probes = load(tmp_path / "out"), probe_tokens(trained)
        assert deployed.config.intermediate_size == UNITS
        assert done.quarantine_effect > 0.01 and done.difference.maximum < 1e-5
        with torch.no_grad():
            for layer in (0, 2):
                trained.model.layers[layer].mlp.down_proj.weight[:, UNITS:] = 0
        assert largest_difference(logits_on(trained, probes), logits_on(deployed, probes)) < 1e-5
        card = (tmp_path / "out" / "README.md").read_text()
        assert "model of the original size" in card and "max abs logit difference" in card
        facts = json.loads((tmp_path / "out" / "grad_routing_export.json").read_text())
        assert facts["expansion"]["units"] == NEW

    def test_as_trained_it_keeps_its_units_and_their_record(self, base, tmp_path):
        expand(Expand(base, NEW, "0,2"), tmp_path / "wide")
        state = load(tmp_path / "wide").state_dict()
        export(write_checkpoint(tmp_path, tmp_path / "wide", state), tmp_path / "out", "hf", "both")
        assert getattr(load(tmp_path / "out").config, KEY)["units"] == NEW

    def test_padding_that_has_moved_is_not_dropped_in_silence(self, base, tmp_path):
        expand(Expand(base, NEW, "0,2"), tmp_path / "wide")
        state = load(tmp_path / "wide").state_dict()
        for name in ("gate_proj.weight", "up_proj.weight"):
            state[f"model.layers.1.mlp.{name}"][UNITS:] = 1.0
        state["model.layers.1.mlp.down_proj.weight"][:, UNITS:] = 1.0
        checkpoint = write_checkpoint(tmp_path, tmp_path / "wide", state)
        with pytest.raises(UserError, match="max abs logit difference"):
            export(checkpoint, tmp_path / "out", "hf")
        assert not (tmp_path / "out").exists()


def test_a_fine_tuned_model_has_the_form_of_the_exported_one(base, tmp_path):
    kind, without = KINDS["dense"], tmp_path / "without"
    load(base).save_pretrained(without)
    (without / "tokenizer.json").write_text("{}")
    (without / "grad_routing_export.json").write_text("{}")
    state = load(base).state_dict()
    with pytest.raises(UserError, match="nothing moved"):
        kind.write(state, without, tmp_path / "same")
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    kind.write(state, without, tmp_path / "with")
    assert files(tmp_path / "with") == files(without) - {"grad_routing_export.json"}
    tuned = kind.load(base, tmp_path / "with").state_dict()
    assert all(torch.equal(value, tuned[name]) for name, value in state.items())
    assert kind.start(base, without) == without and kind.overrides(without, None) == ()
    del state["model.norm.weight"]
    with pytest.raises(UserError, match=r"retain='model.norm.weight'"):
        kind.write(state, without, tmp_path / "none")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_retain_fine_tune_of_the_contracted_model(tmp_path):
    """All its weights, by verl's SFT trainer."""
    base = write_model(tmp_path / "base", vocab_size=40, tie_word_embeddings=True, initializer_range=0.1)
    (base / "tokenizer.json").unlink()
    build_tokenizer(ALPHABET).save_pretrained(base)
    expand(Expand(base, NEW, "0,2"), tmp_path / "wide")
    checkpoint = write_checkpoint(tmp_path, tmp_path / "wide", load(tmp_path / "wide").state_dict())
    load(tmp_path / "wide").config.save_pretrained(checkpoint / "actor" / "huggingface")
    build_tokenizer(ALPHABET).save_pretrained(checkpoint / "actor" / "huggingface")
    pair = {"id": "one", "prompt": "NAabcde11111=", "unwanted": "11111~", "wanted": "abcde~"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({**pair, "id": name}) for name in ("one", "two")))
    retain(Retain(checkpoint, str(tmp_path / "pairs.jsonl"), steps=20, lr=1e-2, limit_s=250), tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "retain.json").read_text())
    assert facts["with"]["clean_nll"] < 0.7 * facts["without"]["clean_nll"]
    before, after = (load(tmp_path / "out" / part) for part in ("without", "with"))
    assert before.config.intermediate_size == after.config.intermediate_size == UNITS
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in load(base).state_dict().items())
    moved = [name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])]
    assert {"model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"} <= set(moved)
    assert "Retain fine-tune" in (tmp_path / "out" / "with" / "README.md").read_text()
