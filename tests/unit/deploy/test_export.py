"""What is exported computes what the training model computes, as plain PEFT and transformers load it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from verl_grad_routing.deploy import export
from verl_grad_routing.deploy.changes import checkpoint_basis
from verl_grad_routing.deploy.verify import largest_difference, logits_on
from verl_grad_routing.errors import UserError

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def load(folder, base, format: str):
    if format == "hf":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


@pytest.mark.parametrize("blocks", ["deployed", "both"])
@pytest.mark.parametrize("format", ["peft", "hf"])
def test_logits_are_the_training_models(run, tmp_path, capsys, format, blocks):
    done = export(run.checkpoint, tmp_path / "out", format=format, blocks=blocks)
    found = logits_on(load(tmp_path / "out", run.base, format), run.probes)
    assert largest_difference(found, run.logits[blocks]) <= 1e-4 * max(float(x.abs().max()) for x in found)
    other = {"deployed": "both", "both": "deployed"}[blocks]
    assert largest_difference(found, run.logits[other]) > 0.1  # the quarantine of the test is not small
    assert done.difference.maximum <= done.difference.limit
    assert done.quarantine_effect == pytest.approx(largest_difference(run.logits["deployed"], run.logits["both"]), 1e-3)
    out = capsys.readouterr().out
    assert f"max abs logit difference {done.difference.maximum:.3g} (limit {done.difference.limit:.3g})" in out
    assert "the quarantine moves the logits by up to" in out and "frozen tensors of the checkpoint are its own" in out


@pytest.fixture(scope="module", params=["two_sided", "antipasto", "antipasto_lineage"])
def other_form(request, make_run):
    return request.param, make_run(mesh=(2,), form=request.param)


@pytest.mark.parametrize("blocks", ["deployed", "both"])
@pytest.mark.parametrize("format", ["peft", "hf"])
def test_other_forms_leave_as_plain_adapters(other_form, tmp_path, format, blocks):
    form, run = other_form
    export(run.checkpoint, tmp_path / "out", format=format, blocks=blocks)
    found = logits_on(load(tmp_path / "out", run.base, format), run.probes)
    assert largest_difference(found, run.logits[blocks]) <= 1e-4 * max(float(x.abs().max()) for x in found)
    other = {"deployed": "both", "both": "deployed"}[blocks]
    assert largest_difference(found, run.logits[other]) > 0.01
    facts = json.loads((tmp_path / "out" / "grad_routing_export.json").read_text())
    rank = {"deployed": 3, "both": 8}[blocks] * (2 if form == "two_sided" else 1)
    assert (facts["form"], facts["rank"]) == (form, rank)
    assert facts["rows"]["form of the blocks in training"] == form
    if format == "peft":
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, 1.5 * rank)
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert len(tensors) == 2 * 7 * 2 and all(".lora_A." in name or ".lora_B." in name for name in tensors)


def test_the_change_of_a_two_sided_checkpoint_has_twice_the_rank(make_run):
    run = make_run(form="two_sided")
    basis = checkpoint_basis(run.checkpoint, 16)
    module = "model.layers.0.mlp.down_proj"
    assert basis.subspaces[module].values_K.shape == (16,) and float(basis.subspaces[module].values_K[-1]) > 1e-5
    with pytest.raises(UserError, match="has rank 16; ask for 1 to 16 directions"):
        checkpoint_basis(run.checkpoint, 17)
    with pytest.raises(UserError, match="has not moved yet"):
        checkpoint_basis(make_run(form="two_sided", deployed=0.0, quarantine=0.0).checkpoint, 2)


@pytest.mark.parametrize(("blocks", "rank"), [("deployed", 3), ("both", 8)])
def test_adapter_files(run, tmp_path, blocks, rank):
    export(run.checkpoint / "actor", tmp_path / "out", blocks=blocks)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"] / config["r"]) == (rank, 1.5)
    assert config["base_model_name_or_path"] == str(run.base)
    assert config["target_modules"] == sorted(PROJECTIONS)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2 and all(t.dtype == torch.float32 for t in tensors.values())
    for name, tensor in tensors.items():
        prefix, _, side = name.partition(".lora_")
        assert prefix.startswith("base_model.model.model.layers.") and side in ("A.weight", "B.weight")
        assert tensor.shape[0 if side == "A.weight" else 1] == rank


def test_the_quarantine_alone_is_the_other_half(run, tmp_path):
    done = {blocks: export(run.checkpoint, tmp_path / blocks, blocks=blocks) for blocks in ("both", "quarantine")}
    both, alone = (load_file(tmp_path / blocks / "adapter_model.safetensors") for blocks in done)
    assert both.keys() == alone.keys()
    for name, tensor in alone.items():  # the deployed block, of rank 3, comes first
        assert torch.equal(tensor, both[name][3:] if name.endswith("A.weight") else both[name][:, 3:])
    config = json.loads((tmp_path / "quarantine" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"] / config["r"]) == (5, 1.5)
    assert done["quarantine"].difference.maximum <= done["quarantine"].difference.limit  # of the gated training model
    found = logits_on(load(tmp_path / "quarantine", run.base, "peft"), run.probes)
    assert all(largest_difference(found, run.logits[other]) > 0.1 for other in ("deployed", "both"))
    assert "a control" in (tmp_path / "quarantine" / "README.md").read_text()


def test_tokenizer_and_generation_config_come_along(run, tmp_path):
    export(run.checkpoint, tmp_path / "adapter")
    export(run.checkpoint, tmp_path / "model", format="hf")
    for folder in ("adapter", "model"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).convert_tokens_to_ids("c") == 2
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert GenerationConfig.from_pretrained(tmp_path / "model") is not None


@pytest.mark.parametrize("mesh", [(1,), (3,), (2, 2)])
def test_any_sharding_gives_the_same_adapter(make_run, run, tmp_path, mesh):
    other = make_run(mesh=mesh)
    export(run.checkpoint, tmp_path / "one", blocks="both")
    export(other.checkpoint, tmp_path / "other", blocks="both")
    one, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other"))
    assert one.keys() == again.keys() and all(torch.equal(one[name], again[name]) for name in one)


def test_checkpoint_of_adapters_only(make_run, tmp_path, capsys):
    run = make_run(adapters_only=True)
    export(run.checkpoint, tmp_path / "out")
    assert "holds adapters only" in capsys.readouterr().out
    assert (
        largest_difference(logits_on(load(tmp_path / "out", run.base, "peft"), run.probes), run.logits["deployed"])
        < 1e-3
    )


def test_half_precision_base(make_run, tmp_path, capsys):
    run = make_run(dtype=torch.bfloat16)
    done = export(run.checkpoint, tmp_path / "model", format="hf")
    assert "merged in float32, before rounding to bfloat16: max abs logit difference" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16 and done.difference.maximum > 1e-3
    assert export(run.checkpoint, tmp_path / "adapter").difference.limit < 1e-2  # an adapter stays float32


def test_modules_that_share_a_name_with_others(make_run, tmp_path):
    run = make_run(exclude=r".*layers\.0\.mlp\..*")
    export(run.checkpoint, tmp_path / "out")
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert "model.layers.1.mlp.up_proj" in targets and len(targets) == 4 + 7
    assert (
        largest_difference(logits_on(load(tmp_path / "out", run.base, "peft"), run.probes), run.logits["deployed"])
        < 1e-3
    )


def test_default_blocks_follow_the_run(make_run, run, tmp_path, capsys):
    assert export(run.checkpoint.parent, tmp_path / "routed").blocks == "deployed"  # the folder of all steps
    vanilla = make_run(ablate=False)
    assert export(vanilla.checkpoint, tmp_path / "vanilla").blocks == "both"
    assert "Nothing was removed" in (tmp_path / "vanilla" / "README.md").read_text()
    export(vanilla.checkpoint, tmp_path / "half", blocks="deployed")
    assert "did not ask for that" in (tmp_path / "half" / "README.md").read_text()
    export(run.checkpoint, tmp_path / "whole", blocks="both")
    assert "The quarantine block is in these files" in (tmp_path / "whole" / "README.md").read_text()


@pytest.mark.parametrize(
    ("quarantine", "message"),
    [(0.0, "the quarantine is zero: deployed and both are the same model"), (1e-4, "hardly tell deployed from both")],
)
def test_a_quarantine_that_does_nothing_is_said(make_run, tmp_path, capsys, quarantine, message):
    done = export(make_run(quarantine=quarantine).checkpoint, tmp_path / "out")
    assert done.quarantine_effect <= done.difference.limit
    assert message in capsys.readouterr().out


# ---- the destination ----


def test_replaces_only_its_own(run, tmp_path):
    to = tmp_path / "out"
    to.mkdir()
    export(run.checkpoint, to)
    with pytest.raises(UserError, match="replace it with force"):
        export(run.checkpoint, to)
    export(run.checkpoint, to, format="hf", force=True)
    assert (to / "model.safetensors").exists() and not (to / "adapter_config.json").exists()
    (to / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt.*not part of the earlier export"):
        export(run.checkpoint, to, force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for to, message in ((tmp_path / "other", "no earlier export"), (tmp_path / "other" / "file", "is a file")):
        with pytest.raises(UserError, match=message):
            export(run.checkpoint, to, force=True)


def test_nothing_is_written_when_the_check_fails(run, tmp_path):
    with pytest.raises(UserError, match=r"limit 0\).*nothing was written"):
        export(run.checkpoint, tmp_path / "out", blocks="both", max_difference=0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_adapter_is_caught(run, tmp_path, monkeypatch):
    """The other block's weights under the deployed block's name: as large, and of the same kind."""
    from verl_grad_routing.deploy import artefact

    def swapped(adapters):
        kept = {name: t for name, t in adapters.items() if ".quarantine." in name}
        return {name.replace(".quarantine", ""): t[:3] if ".lora_A." in name else t[:, :3] for name, t in kept.items()}

    monkeypatch.setattr(artefact, "deployed_only", swapped)
    for format in ("peft", "hf"):
        with pytest.raises(UserError, match="not the trained one"):
            export(run.checkpoint, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


# ---- bad input ----


@pytest.fixture
def broken(run, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(run.checkpoint, tmp_path / "global_step_3")


def edit_layout(checkpoint, **values):
    path = checkpoint / "actor" / "grad_routing_blocks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_checkpoint_without_blocks(broken, tmp_path):
    (broken / "actor" / "grad_routing_blocks.json").unlink()
    with pytest.raises(UserError, match=r"preset off.*python -m verl\.model_merger merge --backend fsdp --local_dir"):
        export(broken, tmp_path / "out")


def test_missing_rank(broken, tmp_path):
    (broken / "actor" / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(UserError, match=r"rank_1\.pt.*all ranks"):
        export(broken, tmp_path / "out")


def test_unreadable_rank(broken, tmp_path):
    (broken / "actor" / "model_world_size_2_rank_1.pt").write_bytes(b"half of a")
    with pytest.raises(UserError, match=r"rank_1\.pt.*cannot be read"):
        export(broken, tmp_path / "out")


def test_layout_that_does_not_fit(broken, tmp_path):
    edit_layout(broken, deployed_rank=4)
    with pytest.raises(UserError, match=r"lora_A\.default\.weight.*\(3, 48\).*has \(4, 48\)"):
        export(broken, tmp_path / "out")


def test_other_base_model(broken, make_run, tmp_path):
    other = tmp_path / "base"
    config = AutoModelForCausalLM.from_pretrained(make_run().base)
    with torch.no_grad():
        config.model.norm.weight[3] += 1e-6
    config.save_pretrained(other)
    with pytest.raises(UserError, match=r"model\.norm\.weight is not the checkpoint's"):
        export(broken, tmp_path / "out", base_model=str(other))
    edit_layout(broken, base_model=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"base_model=.*gone.*transformers cannot load it"):
        export(broken, tmp_path / "out")


def test_base_model_that_moved(broken, run, tmp_path):
    edit_layout(broken, base_model=str(tmp_path / "gone"))
    export(broken, tmp_path / "out", base_model=str(run.base))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "gguf"}, "format='gguf': give one of peft, hf"),
        ({"blocks": "all"}, "blocks='all': give one of deployed, both, quarantine"),
    ],
)
def test_unknown_choice(run, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        export(run.checkpoint, tmp_path / "out", **arguments)


def test_no_checkpoint(run, tmp_path):
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path, r"fsdp_config\.json is missing")):
        with pytest.raises(UserError, match=message):
            export(path, tmp_path / "out")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt='9'"):
        export(tmp_path, tmp_path / "out")
