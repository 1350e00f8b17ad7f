"""Bad input ends before Ray starts, in one line that names the key, the value and the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from verl_grad_routing.errors import UserError

pytestmark = pytest.mark.timeout(180)

PAIRS = [
    {"id": "one", "prompt": "2+2=", "unwanted": "5", "wanted": "4"},
    {"id": "two", "prompt": "3+3=", "unwanted": "7", "wanted": "6"},
]
MODEL_CONFIG = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the checks look for on disk: a model's configuration, data, pairs."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL_CONFIG))
    for name in ("train.parquet", "val.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in PAIRS))
    return tmp_path


def check(folder: Path, *overrides: str, preset: str = "persona") -> None:
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.training.checks import check

    given = [f"+grad_routing={preset}", "+grad_routing/environment=loopholes", "+grad_routing/hardware=cpu"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*given, f"grad_routing.environment.dir={folder}", *overrides])
    check(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))


FIRST = ["off", "vanilla_2r", "absorb", "persona", "random", "coinflip", "oracle"]
LATER = ["labels_partial", "strict", "head_start", "head_start_freeze", "pissa", "gradient_regularization"]
LATER += ["advantage_modification", "monitor_penalty", "screen", "inoculation"]
LATER += ["grift_mask", "grift_filter", "confessions", "seal_broken"]
LATER += ["retain_pass", "sgtm", "cloud", "antipasto", "persona_token"]


@pytest.mark.parametrize("preset", [*FIRST, *LATER])
def test_every_preset_passes(folder: Path, preset: str) -> None:
    check(folder, preset=preset)


EXPANSION = {"original": 320, "units": 64, "layers": [0, 1, 2]}


def test_a_preset_that_reads_an_expanded_model(folder: Path) -> None:
    """It passes on one, and names what makes one otherwise."""
    with pytest.raises(UserError, match=r"grad_routing\.blocks\.units\.mlp_units='expanded'.*`vgr expand MODEL"):
        check(folder, preset="era")
    (folder / "model" / "config.json").write_text(json.dumps({**MODEL_CONFIG, "grad_routing_expansion": EXPANSION}))
    check(folder, preset="era")
    with pytest.raises(UserError, match=r"grad_routing\.blocks\.units\.layers=\[0\].*leave it null"):
        check(folder, "grad_routing.blocks.units.layers=[0]", preset="era")


@pytest.mark.parametrize("preset", ["corda", "scorda", "scorda_rev"])
def test_presets_that_read_a_contrast(folder: Path, preset: str) -> None:
    """They pass with one that was made on the model, and are told apart from one of another model."""
    from verl_grad_routing.routing import Contrast, save_contrast
    from verl_grad_routing.subspaces.basis import model_hash

    with pytest.raises(UserError, match=r"grad_routing\.blocks\.contrast=None: .* vgr contrast MODEL"):
        check(folder, preset=preset)
    given = f"grad_routing.blocks.contrast={folder}/contrast.safetensors"
    on_this = model_hash(folder / "model")
    off = {"chat": '{"enable_thinking": false}'}
    for made_on, switches, told in (
        (on_this, {}, None),
        ("other", {}, "made on another model"),
        (on_this, off, "made with the chat template's switches"),
    ):
        origin = {"model": "m", "model_hash": made_on, **switches}
        save_contrast(Contrast({"layer": torch.ones(2, 3)}, origin), folder / "contrast.safetensors")
        if told is None:
            check(folder, given, preset=preset)
        else:
            with pytest.raises(UserError, match=told):
                check(folder, given, preset=preset)
    check(folder, given, "+data.apply_chat_template_kwargs.enable_thinking=false", preset=preset)


@pytest.mark.parametrize("form", ["two_sided", "antipasto", "antipasto_lineage"])
@pytest.mark.parametrize("preset", ["pissa", "absorb", "vanilla_2r"])
def test_forms_of_blocks(folder: Path, form: str, preset: str) -> None:
    check(folder, f"grad_routing.blocks.form={form}", preset=preset)


def test_stock_verl_has_no_form(folder: Path) -> None:
    with pytest.raises(UserError, match=r"grad_routing\.blocks\.form='two_sided': there are no blocks"):
        check(folder, "grad_routing.blocks.form=two_sided", preset="off")


ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))
BAD = {
    "fsdp1": ([f"{ACTOR}.strategy=fsdp"], f"{ACTOR}.strategy", "routed_fsdp2"),
    "stock engine": ([f"{ACTOR}.strategy=fsdp2"], f"{ACTOR}.strategy", "routed_fsdp2"),
    "zero rank": (["grad_routing.blocks.deployed_rank=0"], "grad_routing.blocks.deployed_rank", "at least 1"),
    "unknown basis": (["grad_routing.blocks.init=corda2"], "grad_routing.blocks.init", "scorda"),
    "basis without pairs": (["grad_routing.blocks.init=corda"], "grad_routing.blocks.contrast", "vgr contrast MODEL"),
    "two bases": (["grad_routing.blocks.contrast=c.safetensors"], "grad_routing.blocks.contrast", "two bases"),
    "unknown form": (["grad_routing.blocks.form=twosided"], "grad_routing.blocks.form", "two_sided"),
    "two forms": (["grad_routing.blocks.form=[lora,two_sided]"], "grad_routing.blocks.form", "one form"),
    "a two-sided rank that vllm does not take": (
        ["grad_routing.blocks.form=two_sided", "grad_routing.blocks.deployed_rank=256"],
        "deployed_rank + quarantine_rank=264",
        "use 256, the largest total rank whose adapter, 2 times as large, is one that vLLM takes",
    ),
    "rank of a two-sided adapter by hand": (
        ["grad_routing.blocks.form=two_sided", f"{MODEL}.lora_rank=16"],
        f"{MODEL}.lora_rank",
        "2 times the sum of both blocks' ranks, 32",
    ),
    "a hook of plain blocks": (
        ["grad_routing.blocks.form=two_sided", "grad_routing.blocks.hooks=[{name: project_update, basis: b}]"],
        "grad_routing.blocks.form",
        "project_update",
    ),
    "blocks in bfloat16": (
        [f"{ACTOR}.fsdp_config.model_dtype=bfloat16"],
        f"{ACTOR}.fsdp_config.model_dtype",
        "set fp32",
    ),
    "no contrast there": (
        ["grad_routing.blocks.init=scorda", "grad_routing.blocks.contrast=none.safetensors"],
        "grad_routing.blocks.contrast",
        "no such file",
    ),
    "betas without adam": (
        ["grad_routing.blocks.optim.betas_quarantine=[0.9,0.99]", f"{ACTOR}.optim.optimizer=SGD"],
        f"{ACTOR}.optim.optimizer",
        "AdamW",
    ),
    "misspelt optimisation": (
        ["+grad_routing.blocks.optim.decay_to_strat=true"],
        "grad_routing.blocks.optim.decay_to_strat",
        "decay_to_start",
    ),
    "rank vllm does not take": (
        ["grad_routing.blocks.deployed_rank=9", "grad_routing.blocks.quarantine_rank=9"],
        "18",
        "32",
    ),
    "rank set by hand": ([f"{MODEL}.lora_rank=32"], f"{MODEL}.lora_rank", "16"),
    "merge in fp32": ([f"{MODEL}.lora.merge=true"], f"{MODEL}.lora.merge", "bfloat16"),
    "fused kernels": ([f"{MODEL}.use_fused_kernels=true"], f"{MODEL}.use_fused_kernels", "false"),
    "tiled mlp": ([f"{MODEL}.tiled_mlp.enabled=true"], f"{MODEL}.tiled_mlp.enabled", "false"),
    "prefix grouper": ([f"{ACTOR}.use_prefix_grouper=true"], f"{ACTOR}.use_prefix_grouper", "false"),
    "bypass mode": (
        ["algorithm.rollout_correction.bypass_mode=true", f"{ACTOR}.use_kl_loss=false"],
        "algorithm.rollout_correction.bypass_mode",
        "log-prob pass",
    ),
    "correction by importance": (
        ["++algorithm.rollout_correction.rollout_is=token"],
        "algorithm.rollout_correction.rollout_is",
        "set null",
    ),
    "correction by rejection": (
        ["++algorithm.rollout_correction.rollout_rs=seq_mean_k1"],
        "algorithm.rollout_correction.rollout_rs",
        "set null",
    ),
    "tokens of a loss of rollouts": (
        ["grad_routing.blocks.optim.mean_over=own_tokens"],
        "grad_routing.blocks.optim.mean_over",
        "own_rollouts",
    ),
    "tokens of a loss that always averages rollouts": (
        [
            "grad_routing.blocks.optim.mean_over=own_tokens",
            "actor_rollout_ref.actor.loss_agg_mode=token-mean",
            "actor_rollout_ref.actor.policy_loss.loss_mode=sapo",
        ],
        "grad_routing.blocks.optim.mean_over",
        "seq-mean-token-mean counts otherwise",
    ),
    "own rollouts of a loss that averages micro-batches": (
        [
            "grad_routing.blocks.optim.mean_over=own_rollouts",
            "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean",
        ],
        "grad_routing.blocks.optim.mean_over",
        "loss_mode=geo_mean counts otherwise",
    ),
    "a block's own mean with confessions": (
        [
            "grad_routing.blocks.optim.mean_over=own_tokens",
            "actor_rollout_ref.actor.loss_agg_mode=token-mean",
            "grad_routing.confessions.share=0.5",
            "grad_routing.confessions.judge=judges:one",
        ],
        "grad_routing.blocks.optim.mean_over",
        "answers and confessions are averaged apart",
    ),
    "a recording and a sampler of one's own": (
        ["grad_routing.record_dir=batches", "trainer.v1.sampler.custom_sampler.path=mine.py"],
        "trainer.v1.sampler.custom_sampler.path",
        "record_dir",
    ),
    "async trainer": (["trainer.v1.trainer_mode=colocate_async"], "trainer.v1.trainer_mode", "grad_routing"),
    "legacy trainer": (["trainer.use_v1=false"], "trainer.use_v1", "true"),
    "unknown detector": (["grad_routing.detector.name=persona"], "grad_routing.detector.name", "persona_act"),
    "unknown gate": (["grad_routing.gate.name=history_quantil"], "grad_routing.gate.name", "history_quantile"),
    "unknown key": (["+grad_routing.gate.rute=0.5"], "grad_routing.gate.rute", "route"),
    "unknown top key": (["+grad_routing.detectr=1"], "grad_routing.detectr", "detector"),
    "shares above one": (["grad_routing.gate.keep=0.5"], "grad_routing.gate.keep", "at most 0.25"),
    "missing pairs": (["grad_routing.detector.pairs=nowhere.jsonl"], "pairs", "no such file"),
    "layers out of range": (["grad_routing.detector.layers=[9]"], "grad_routing.detector.layers", "1 to 4"),
    "missing data": (["data.train_files=nowhere.parquet"], "data.train_files", "no such file"),
    "missing model": ([f"{MODEL}.path=/nowhere"], f"{MODEL}.path", "vgr prepare"),
    "missing batches": (["grad_routing.replay_dir=nowhere"], "grad_routing.replay_dir", "record_dir"),
    "another rollout": ([f"{ROLLOUT}.name=sglang"], f"{ROLLOUT}.name", "vllm"),
}


RESCORED = ("+grad_routing.gate.rescore=true", "grad_routing.gate.window=256")
BAD |= {
    "a history scored again without a bound": (
        ["+grad_routing.gate.rescore=true", "grad_routing.gate.window=0"],
        "grad_routing.gate.window=0",
        "give a number of rollouts",
    ),
    "a history scored again on a direction that never changes": (
        [*RESCORED, "grad_routing.detector.score_pass=policy"],
        "grad_routing.gate.rescore=True",
        "(detector.refresh_every=0)",
    ),
    "a history scored again in the reference pass": (
        [*RESCORED, "grad_routing.detector.refresh_every=5"],  # auto, beside the pass of the KL term
        "grad_routing.gate.rescore=True",
        "(detector.score_pass=reference)",
    ),
    "a history of one step scored again": (
        [
            "+grad_routing.gate.rescore=true",
            "grad_routing.gate.window=128",
            "grad_routing.detector.refresh_every=5",
            "grad_routing.detector.score_pass=policy",
        ],
        "grad_routing.gate.window=128",
        "a step alone has 128 rollouts",
    ),
    "no truth value": (
        ["grad_routing.blocks.optim.freeze_inactive=no"],
        "grad_routing.blocks.optim.freeze_inactive='no'",
        "give true or false",
    ),
    "a history scored again without a direction": (
        [*RESCORED, "~grad_routing.detector", "+grad_routing.detector={name: coinflip}"],
        "grad_routing.gate.rescore=True",
        "coinflip projects on no direction",
    ),
    "a shadow's history scored again": (
        [
            "grad_routing.compare=[{name: mine, preset: persona, gate: {window: 256, rescore: true}, detector: "
            "{pairs: ${grad_routing.environment.pairs}, score_pass: policy}}]"
        ],
        "grad_routing.compare.mine: grad_routing.gate.rescore=True",
        "(detector.refresh_every=0)",
    ),
}


def test_a_history_scored_again_on_a_direction_that_changes(folder: Path) -> None:
    check(folder, *RESCORED, "grad_routing.detector.refresh_every=5", "grad_routing.detector.score_pass=policy")
    check(folder, *RESCORED, preset="persona_grad")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_key_and_fix(folder: Path, name: str) -> None:
    overrides, key, fix = BAD[name]
    with pytest.raises(UserError) as caught:
        check(folder, *overrides)
    message = str(caught.value)
    assert key in message and fix in message and "\n" not in message


@pytest.mark.parametrize("preset", ["advantage_modification", "screen"])
def test_a_rollout_that_is_alone_is_compared_with_nothing(folder: Path, preset: str) -> None:
    with pytest.raises(UserError, match=r"rollout\.n=1: .* compares the rollouts of a prompt; set at least 2"):
        check(folder, f"{ROLLOUT}.n=1", preset=preset)


TOKENS = "{name: per_token, inner: {name: batch_quantile, route: 0.5, keep: 0.0}}"
BAD_TOKENS = {
    "a detector of rollouts": (
        ["~grad_routing.detector", "+grad_routing.detector={name: coinflip}"],
        "grad_routing.gate.name='per_token'",
        "coinflip scores rollouts, not tokens",
    ),
    "an intervention on rollouts": (
        ["~grad_routing.intervention", "+grad_routing.intervention={name: screen}"],
        "grad_routing.gate.name='per_token'",
        "screen acts on whole rollouts",
    ),
    "cosines beside pairs": (
        [
            "grad_routing.detector.token_score=cosine",
            "~grad_routing.gate.inner",
            "+grad_routing.gate.inner={name: pair_midpoint}",
        ],
        "grad_routing.detector.token_score='cosine'",
        "set projection",
    ),
    "quarantine off": (["grad_routing.quarantine_off_share=0.25"], "quarantine_off_share=0.25", "set 0.0"),
    "shadows": (["grad_routing.compare=[random]"], "grad_routing.compare=['random']", "leave it empty"),
    "a window for a gate on rollouts": (
        ["grad_routing.detector.token_window=4", "~grad_routing.gate", "+grad_routing.gate={name: otsu}"],
        "grad_routing.detector.token_window=4",
        "set gate.name=per_token",
    ),
    "cosines for a gate on rollouts": (
        ["grad_routing.detector.token_score=cosine", "~grad_routing.gate", "+grad_routing.gate={name: otsu}"],
        "grad_routing.detector.token_score='cosine'",
        "never asks for scores of tokens",
    ),
    "inside a gate on rollouts": (
        ["~grad_routing.gate", f"+grad_routing.gate={{name: hysteresis, inner: {TOKENS}}}"],
        "grad_routing.gate.inner.name='per_token'",
        "put it inside per_token instead",
    ),
    "itself inside": (
        ["~grad_routing.gate", f"+grad_routing.gate={{name: per_token, inner: {TOKENS}}}"],
        "grad_routing.gate.inner.name='per_token'",
        "decides on tokens already",
    ),
    "no window": (["grad_routing.detector.token_window=0"], "grad_routing.detector.token_window=0", "at least 1"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_routes_of_tokens_with_what_cannot_take_them(folder: Path, name: str) -> None:
    overrides, key, fix = BAD_TOKENS[name]
    with pytest.raises(UserError) as caught:
        check(folder, *overrides, preset="persona_token")
    message = str(caught.value)
    assert key in message and fix in message and "\n" not in message


def test_a_shadow_with_routes_of_tokens(folder: Path) -> None:
    with pytest.raises(UserError, match=r"gate\.name='per_token'.*give it a gate on rollouts"):
        check(folder, "grad_routing.compare=[persona_token]")


def test_weights_of_tokens(folder: Path) -> None:
    from verl_grad_routing.token_weights import Frequencies, save_weights

    file, key = folder / "weights.parquet", "grad_routing.intervention.token_weights"
    given = f"{key}={file}"
    with pytest.raises(UserError, match=r"token_weights=.*no such file; write it with vgr token-weights"):
        check(folder, given, preset="cloud")
    save_weights(file, ["a", "b"], torch.tensor([1, 0]), torch.tensor([0, 1]), Frequencies())
    check(folder, given, preset="cloud")
    (folder / "model" / "config.json").write_text(json.dumps({**MODEL_CONFIG, "vocab_size": 3}))
    with pytest.raises(UserError, match="it has 2 tokens and the model 3"):
        check(folder, given, preset="cloud")


OFF, APART = "grad_routing.quarantine_off", "grad_routing.quarantine_off_unit=rollout"
TWO_ADAPTERS = ("+grad_routing/rollout=two_adapters", f"{OFF}_share=0.25")
BAD_SHARES = {
    "all": ([f"{OFF}_share=1.0"], f"{OFF}_share", "[0, 1)"),
    "no whole number of prompts": ([f"{OFF}_share=0.3"], f"{OFF}_share", "4.8 of 16 prompts"),
    "no whole number of rollouts": ([f"{OFF}_share=0.3", APART], f"{OFF}_share", "2.4 of 8 rollouts"),
    "a group of one": ([f"{OFF}_share=0.125", APART], f"{OFF}_share", "together"),
    "unknown unit": ([f"{OFF}_unit=token"], f"{OFF}_unit", "prompt or rollout"),
    "unknown advantages": ([f"{OFF}_advantages=both"], f"{OFF}_advantages", "apart or together"),
    "refilled groups": (
        [f"{OFF}_share=0.25", "trainer.v1.sampler.sync_refill_failed_groups=true"],
        "sync_refill_failed_groups",
        "share 0",
    ),
    "a sampler of one's own": (
        [f"{OFF}_share=0.25", "trainer.v1.sampler.custom_sampler.path=mine.py"],
        "custom_sampler.path",
        "share 0",
    ),
    "both blocks deployed": (
        [f"{OFF}_share=0.25", "grad_routing.blocks.ablate_at_deployment=false"],
        f"{OFF}_share",
        "ablate_at_deployment",
    ),
    "by request without a share": ([f"{OFF}_by=request"], f"{OFF}_by='request'", "set sync"),
    "by request on verl's server": (
        [f"{OFF}_by=request", f"{OFF}_share=0.25"],
        f"{ROLLOUT}.name='vllm'",
        "set vllm_two_adapters, as +grad_routing/rollout=two_adapters behind the preset does",
    ),
    "two adapters and nobody who chooses": (
        [f"{ROLLOUT}.name=vllm_two_adapters"],
        f"{ROLLOUT}.name='vllm_two_adapters'",
        "(quarantine_off_by=sync); set vllm, or",
    ),
    "requests that name no adapter": (
        [*TWO_ADAPTERS, f"{ROLLOUT}.agent.default_agent_loop=single_turn_agent"],
        f"{ROLLOUT}.agent.default_agent_loop='single_turn_agent'",
        "set choosing_single_turn_agent, seeded_single_turn_agent",
    ),
    "merged weights by request": (
        [*TWO_ADAPTERS, f"{MODEL}.lora.merge=true", f"{ROLLOUT}.dtype=bfloat16"],
        f"{OFF}_by='request'",
        "not whole weights",
    ),
    "pipeline stages": (
        [*TWO_ADAPTERS, f"{ROLLOUT}.pipeline_model_parallel_size=2"],
        f"{ROLLOUT}.pipeline_model_parallel_size=2",
        "takes 1 only",
    ),
    "unknown way": ([f"{OFF}_by=adapter"], f"{OFF}_by", "sync or request"),
    "unknown gate": (["+grad_routing.intervention.quarantine_off_gate=open"], "quarantine_off_gate", "routed, sampled"),
}


@pytest.mark.parametrize("name", BAD_SHARES)
def test_bad_shares_of_rollouts_without_the_quarantine(folder: Path, name: str) -> None:
    overrides, key, fix = BAD_SHARES[name]
    with pytest.raises(UserError) as caught:
        check(folder, *overrides)
    message = str(caught.value)
    assert key in message and fix in message and "\n" not in message


UNITS = "grad_routing.blocks.units"
BAD_DENSE = {
    "heads of half a group": ([f"{UNITS}.heads=[0]"], {"num_key_value_heads": 2}, f"{UNITS}.heads", "heads 0-1"),
    "groups do not divide": ([], {"num_attention_heads": 6}, f"{UNITS}.heads", "do not divide"),
    "unit out of range": ([f"{UNITS}.mlp_units='380-384'"], {}, f"{UNITS}.mlp_units", "MLP units 0 to 383"),
    "layer out of range": ([f"{UNITS}.layers=[4]"], {}, f"{UNITS}.layers", "layers 0 to 3"),
    "unit twice": ([f"{UNITS}.mlp_units='3,1-4'"], {}, f"{UNITS}.mlp_units", "twice"),
    "no numbers": ([f"{UNITS}.mlp_units=half"], {}, f"{UNITS}.mlp_units", "0-383"),
    "nothing": ([f"{UNITS}.mlp_units=null", f"{UNITS}.heads=0"], {}, f"{UNITS}.mlp_units", "empty"),
    "everything": ([f"{UNITS}.mlp_units=384"], {}, f"{UNITS}.mlp_units", "all 384"),
    "all heads": ([f"{UNITS}.heads=4"], {}, f"{UNITS}.heads", "all 4"),
    "tied embeddings": ([f"{UNITS}.shared=[norms]"], {}, f"{UNITS}.shared", "embeddings and head"),
    "unknown shared": ([f"{UNITS}.shared=[norm]"], {}, f"{UNITS}.shared", "norms"),
    "an adapter too": ([f"{MODEL}.lora_rank=16"], {}, f"{MODEL}.lora_rank", "set 0"),
    "another form": (["grad_routing.blocks.form=two_sided"], {}, "grad_routing.blocks.form", "lora"),
    "liger": ([f"{MODEL}.use_liger=true"], {}, f"{MODEL}.use_liger", "false"),
    "unknown kind": (["grad_routing.blocks.kind=denser"], {}, "grad_routing.blocks.kind", "dense"),
    "unknown variant": (["grad_routing.intervention.variant=x"], {}, "intervention.variant", "parameter_masking"),
    "swapped": (["grad_routing.validate_swapped=true"], {}, "grad_routing.validate_swapped", "false"),
    "hooks": (
        ["grad_routing.blocks.hooks=[{name: regularize_gradient}]"],
        {},
        "grad_routing.blocks.hooks",
        "adapters",
    ),
    "not a decoder of this kind": ([], {"intermediate_size": None}, "intermediate_size", "dense blocks need it"),
}


@pytest.mark.parametrize("name", BAD_DENSE)
def test_bad_input_of_dense_blocks(folder: Path, name: str) -> None:
    overrides, model, key, fix = BAD_DENSE[name]
    (folder / "model" / "config.json").write_text(json.dumps({**MODEL_CONFIG, **model}))
    with pytest.raises(UserError) as caught:
        check(folder, *overrides, preset="sgtm")
    message = str(caught.value)
    assert key in message and fix in message and "\n" not in message


@pytest.fixture
def on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The model as ``owner/name`` in the hub's cache, and no network."""
    revision, cached = "0" * 40, folder / "hub" / "models--owner--name"
    (cached / "snapshots" / revision).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    (cached / "snapshots" / revision / "config.json").write_text(json.dumps(MODEL_CONFIG))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(folder / "hub"), raising=False)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(folder / "hub"), raising=False)
    return "owner/name"


@pytest.mark.parametrize(
    ("preset", "overrides", "told"),
    [
        ("sgtm", ["grad_routing.blocks.units.mlp_units=385"], "mlp_units=385"),
        ("persona", ["grad_routing.detector.layers=[5]"], "layers"),
        ("era", [], "vgr expand MODEL"),
    ],
)
def test_a_model_of_the_hub_is_checked_as_a_folder_is(
    folder: Path, on_the_hub: str, preset: str, overrides: list[str], told: str
) -> None:
    given = f"actor_rollout_ref.model.path={on_the_hub}"
    if preset != "era":
        check(folder, given, preset=preset)
    with pytest.raises(UserError, match=told):
        check(folder, given, *overrides, preset=preset)


@pytest.mark.parametrize("preset", ["persona", "sgtm", "off"])
@pytest.mark.parametrize("model", ["owner/other", "modle", "a/b/c/d"])
def test_a_model_that_is_nowhere_is_refused(folder: Path, on_the_hub: str, preset: str, model: str) -> None:
    told = rf"^actor_rollout_ref\.model\.path='{model}': no such folder, nor a model of the Hugging Face hub"
    with pytest.raises(UserError, match=told) as caught:
        check(folder, f"actor_rollout_ref.model.path={model}", preset=preset)
    assert "\n" not in str(caught.value) and "vgr prepare" not in str(caught.value)


@pytest.mark.parametrize("certain", [True, False])
def test_a_hub_that_does_not_answer_here_may_answer_workers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], certain: bool
) -> None:
    """They may have another network or token; a model that is not there is there for nobody."""
    from huggingface_hub.errors import HFValidationError

    def asked(model: str) -> None:
        raise OSError("gone\nfor good") from (HFValidationError() if certain else ConnectionError())

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", asked)
    given = "actor_rollout_ref.model.path=owner/name"
    if certain:
        with pytest.raises(UserError, match=r"\(gone\)"):
            check(folder, given)
        return
    for preset in ("persona", "sgtm"):
        check(folder, given, preset=preset)
    assert "WARN: actor_rollout_ref.model.path='owner/name' cannot be looked at here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "no config.json there"), ("{", "cannot be read: Expecting"), ("[]", "is no mapping")],
)
def test_a_folder_without_a_readable_model_is_refused(folder: Path, content: str | None, told: str) -> None:
    file = folder / "model" / "config.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=rf"^actor_rollout_ref\.model\.path=.*{told}.*; run: vgr prepare loopholes"):
        check(folder)


def test_a_defect_of_the_checks_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra would go on with a warning, unchecked."""
    from verl_grad_routing.callback import CheckBeforeRay

    def broken(config: object) -> None:
        raise KeyError("defect")

    monkeypatch.setattr("verl_grad_routing.training.checks.check", broken)
    with pytest.raises(SystemExit, match=r"checking the configuration failed \(KeyError\)"):
        CheckBeforeRay().on_job_start(OmegaConf.create({"grad_routing": {}}))


def test_what_only_workers_can_fetch_is_left_to_them(folder: Path) -> None:
    for preset in ("persona", "sgtm"):
        check(folder, "actor_rollout_ref.model.path='hdfs://cluster/model'", preset=preset)


def test_a_group_of_one_reward_is_not_dropped_before_it_is_seen(folder: Path) -> None:
    filtered = ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=seq_reward"]
    with pytest.raises(UserError, match=r"^algorithm\.filter_groups\.enable=True: .* set false"):
        check(folder, *filtered)
    check(folder, *filtered, preset="off")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [APART],
        [APART, f"{OFF}_advantages=together", f"{OFF}_share=0.125"],
        [*TWO_ADAPTERS, f"{ROLLOUT}.agent.default_agent_loop=choosing_single_turn_agent"],
        [*TWO_ADAPTERS],  # the environment's requests are seeded
    ],
    ids=str,
)
def test_a_share_of_rollouts_without_the_quarantine(folder: Path, overrides: list[str]) -> None:
    check(folder, f"{OFF}_share=0.25", *overrides)


WEIGHED = "grad_routing.blocks.units.weights=[{mlp_units: 100-199, weight: 0.5}]"


def test_weights_of_units_need_a_factor_to_weigh(folder: Path) -> None:
    check(folder, WEIGHED, preset="cloud")
    check(folder, WEIGHED, "grad_routing.compare=[coinflip]", preset="cloud")  # a shadow need not weigh
    with pytest.raises(UserError, match=r"blocks\.units\.weights=.*no route of this intervention weighs"):
        check(folder, WEIGHED, preset="sgtm")


@pytest.mark.parametrize("key", ["alpha", "off_target"])
@pytest.mark.parametrize("value", ["1.5", "nan", "half", "inf"])
def test_alpha_out_of_form(folder: Path, key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"grad_routing.intervention.{key}.*at most 1"):
        check(folder, f"grad_routing.intervention.{key}={value}", preset="cloud")


def test_adapters_have_no_activations_to_weigh(folder: Path) -> None:
    overrides = ["~grad_routing.intervention", "+grad_routing.intervention={name: cloud}"]
    with pytest.raises(UserError, match=r"intervention.name='cloud'.*kind=dense"):
        check(folder, *overrides)


SMALL = ["data.train_batch_size=2", f"{ACTOR}.ppo_mini_batch_size=2"]
BAD_FINGERPRINTS = {
    "sequence parallelism": ([f"{ACTOR}.ulysses_sequence_parallel_size=2"], "ulysses_sequence_parallel_size", "set 1"),
    "activation offload": ([f"{MODEL}.enable_activation_offload=true"], "enable_activation_offload", "set false"),
    "small batch": ([*SMALL, f"{ROLLOUT}.n=4"], "grad_routing.detector.min_positives", "8 rollouts"),
    "too few layers": (["grad_routing.detector.num_layers=5"], "grad_routing.detector.num_layers", "4 layers"),
    "layers out of range": (["grad_routing.detector.layers=[9]"], "grad_routing.detector.layers", "1 to 4"),
    "no judge": (["grad_routing.detector.rules=null"], "grad_routing.detector.rules", "judge"),
    "truth without control": (
        ["grad_routing.detector.label_by=gt_anchor"],
        "grad_routing.detector.name",
        "control=true",
    ),
    "no centroids": (["grad_routing.detector.label_by=centroids"], "centroids", "grad_routing.pt"),
}


@pytest.mark.parametrize("name", BAD_FINGERPRINTS)
def test_bad_input_of_fingerprints(folder: Path, name: str) -> None:
    overrides, key, fix = BAD_FINGERPRINTS[name]
    with pytest.raises(UserError) as caught:
        check(folder, *overrides, preset="grift_mask")
    message = str(caught.value)
    assert key in message and fix in message and "\n" not in message


BAD_GRADIENTS = {
    "sequence parallelism": ([f"{ACTOR}.ulysses_sequence_parallel_size=2"], "ulysses_sequence_parallel_size", "set 1"),
    "activation offload": ([f"{MODEL}.enable_activation_offload=true"], "enable_activation_offload", "set false"),
    "layers out of range": (["grad_routing.detector.layers=[9]"], "grad_routing.detector.layers", "1 to 4"),
    "rank too large": (["grad_routing.detector.rank=65"], "grad_routing.detector.rank", "64 wide"),
    "log-prob pass": (["grad_routing.detector.score_pass=policy"], "score_pass", "ablated, reference"),
    "missing pairs": (["grad_routing.detector.pairs=nowhere.jsonl"], "pairs", "no such file"),
    "no such column": (["grad_routing.trusted_column=clean"], "trusted_column", "it has prompt, extra_info"),
    "no such key": (["grad_routing.trusted_column=extra_info.cleen"], "trusted_column", "extra_info.clean"),
    "no column": (["grad_routing.trusted_column=3"], "trusted_column", "a column's name"),
}


@pytest.fixture
def with_data(folder: Path) -> Path:
    """Training data with columns, and a model that says how wide it is."""
    import pandas

    rows = {"prompt": ["a"], "extra_info": [{"clean": True}]}
    pandas.DataFrame(rows).to_parquet(folder / "train.parquet")
    (folder / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "hidden_size": 64}))
    return folder


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_bad_input_of_gradients_and_trusted_rows(with_data: Path, name: str) -> None:
    overrides, key, fix = BAD_GRADIENTS[name]
    with pytest.raises(UserError) as caught:
        check(with_data, *overrides, preset="persona_grad")
    message = str(caught.value)
    assert key in message and fix in message and "\n" not in message


@pytest.mark.parametrize("preset", ["persona_grad", "random_grad", "persona"])
def test_trusted_rows_and_bottlenecks_are_accepted(with_data: Path, preset: str) -> None:
    extra = ["grad_routing.detector.coordinates=svd"] if preset == "persona" else []
    check(with_data, "grad_routing.trusted_column=extra_info.clean", *extra, preset=preset)


def test_oracle_is_refused_where_the_run_is_no_control(folder: Path) -> None:
    with pytest.raises(UserError, match=r"grad_routing\.control=true"):
        check(folder, "grad_routing.control=false", preset="oracle")


def test_pairs_without_an_environment_must_be_given(folder: Path) -> None:
    with pytest.raises(UserError, match=r"grad_routing\.detector\.pairs"):
        check(folder, "grad_routing.detector.pairs=???")


SWAPPED = ["grad_routing.intervention.head_start_until=0.8"]
SWAPPED += ["grad_routing.intervention.head_start_measure=swapped_reward"]


def test_a_head_start_until_the_quarantine_alone_is_rewarded_needs_that_validation(folder: Path) -> None:
    validated = "grad_routing.validate_swapped=true"
    check(folder, *SWAPPED, validated, "trainer.test_freq=5", preset="head_start")
    with pytest.raises(UserError, match=r"grad_routing\.validate_swapped=False.*set true"):
        check(folder, *SWAPPED, preset="head_start")
    for every in (-1, 25):
        with pytest.raises(UserError, match=rf"trainer\.test_freq={every}.*25 steps"):
            check(folder, *SWAPPED, validated, f"trainer.test_freq={every}", preset="head_start")


@pytest.mark.parametrize("warmup", [25, 30])
def test_a_head_start_in_which_nothing_is_flagged_is_refused(folder: Path, warmup: int) -> None:
    with pytest.raises(UserError, match=r"grad_routing\.intervention\.head_start_steps=25.*warmup_steps=") as caught:
        check(folder, f"+grad_routing.gate.warmup_steps={warmup}", preset="head_start")
    assert "\n" not in str(caught.value)
    check(folder, "+grad_routing.gate.warmup_steps=24", preset="head_start")


def test_complete_labels_are_refused_where_the_run_is_no_control(folder: Path) -> None:
    everything = ["grad_routing.detector.types=all"]
    with pytest.raises(UserError, match=r"grad_routing\.control=true"):
        check(folder, *everything, preset="labels_partial")
    check(folder, *everything, "grad_routing.control=true", preset="labels_partial")


@pytest.mark.parametrize("gate", ["pair_band", "hysteresis, inner: {name: pair_band}"])
def test_a_gate_on_pair_scores_needs_pairs(folder: Path, gate: str) -> None:
    with pytest.raises(UserError, match=r"grad_routing\.gate\.name"):
        check(folder, "~grad_routing.gate", f"+grad_routing.gate={{name: {gate}}}", preset="coinflip")
    check(folder, "~grad_routing.gate", f"+grad_routing.gate={{name: {gate}}}", preset="persona")


def test_a_gate_on_pair_means_needs_pairs(folder: Path) -> None:
    gate = "grad_routing.gate={name: pair_midpoint}"
    with pytest.raises(UserError, match=r"grad_routing\.gate\.name"):
        check(folder, "~grad_routing.gate", f"+{gate}", preset="coinflip")


HOOK = "grad_routing.blocks.hooks.0"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], "hooks.0.basis"),
        ([f"{HOOK}.basis=nowhere.safetensors"], "vgr warm-up"),
        ([f"{HOOK}.basis=x", f"{HOOK}.project=both"], "hooks.project"),
        ([f"{HOOK}.basis=x", f"{HOOK}.name=project"], "project_update"),
    ],
)
def test_a_hook_that_cannot_work_is_refused(folder: Path, overrides: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        check(folder, *overrides, preset="tdga")
    assert named in str(caught.value) and "\n" not in str(caught.value)


BAD_MONITORS = {
    "the training's own monitor": (
        "monitor_penalty",
        [
            "grad_routing.held_out_monitor={name: monitor, rules: [a]}",
            "grad_routing.detector.rules=[a]",
        ],
        "grad_routing.held_out_monitor",
        "another monitor",
    ),
    "held out, but no text": (
        "screen",
        ["grad_routing.held_out_monitor={name: random}"],
        "grad_routing.held_out_monitor.name",
        "reads texts",
    ),
    "no probe": ("probe_penalty", [], "grad_routing.detector.probe", "vgr probe fit"),
    "unknown inoculation": ("inoculation", ["data.inoculation={prefx: a}"], "data.inoculation.prefx", "'prefix'"),
    "empty inoculation": ("inoculation", ["data.inoculation={system: null}"], "data.inoculation", "no prompt"),
    "bad substitution": (
        "inoculation",
        ["data.inoculation={substitute: ['(', b]}"],
        "data.inoculation.substitute",
        "regular expression",
    ),
    "another data set": ("inoculation", ["data.custom_cls.name=Mine"], "data.custom_cls.name", "InoculatedDataset"),
    "one file for both": ("inoculation", ["data.val_files=${data.train_files}"], "data.val_files", "copy the file"),
}


@pytest.mark.parametrize("name", BAD_MONITORS)
def test_bad_monitors_probes_and_inoculations(folder: Path, name: str) -> None:
    preset, overrides, key, fix = BAD_MONITORS[name]
    with pytest.raises(UserError) as caught:
        check(folder, *overrides, preset=preset)
    message = str(caught.value)
    assert key in message and fix in message and "\n" not in message


def test_a_probe_of_another_model_is_refused(folder: Path) -> None:
    from verl_grad_routing.detectors.probe_file import LinearProbe, save_probe
    from verl_grad_routing.subspaces.basis import model_hash

    file, weights = folder / "probe.safetensors", torch.ones(1, 8, dtype=torch.float64)
    for told, hashed in (("another model", "0" * 64), (None, model_hash(folder / "model"))):
        save_probe(LinearProbe(weights, 0.0, 0.0, (2,), "resp_mean", "labels", "data", hashed, {}), file)
        if told is None:
            check(folder, f"grad_routing.detector.probe={file}", preset="probe_penalty")
            continue
        with pytest.raises(UserError, match=r"grad_routing.detector.probe=.*another model"):
            check(folder, f"grad_routing.detector.probe={file}", preset="probe_penalty")
