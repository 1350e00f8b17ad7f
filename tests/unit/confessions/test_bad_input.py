"""What confessions refuse before Ray starts, each in one line."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from verl_grad_routing.errors import UserError

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
    from verl_grad_routing.envs.loopholes.text import ALPHABET

    build_tokenizer(ALPHABET).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "model_type": "llama"}))
    for name in ("train.parquet", "val.parquet"):
        (tmp_path / name).touch()
    return tmp_path


@cache
def composed(preset: str) -> DictConfig:
    import verl  # noqa: F401  (loads the plugin)

    given = [f"+grad_routing={preset}", "+grad_routing/environment=loopholes", "+grad_routing/hardware=cpu"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", given)


def check(folder: Path, *overrides: str, preset: str = "confessions") -> None:
    from verl_grad_routing.training.checks import check

    config = composed(preset).copy()
    OmegaConf.set_struct(config, False)
    config = OmegaConf.merge(config, OmegaConf.from_dotlist([f"grad_routing.environment.dir={folder}", *overrides]))
    check(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["confessions", "seal_broken"])
def test_the_presets_pass(folder: Path, preset: str) -> None:
    check(folder, preset=preset)


KEY, ROLLOUT = "grad_routing.confessions", "actor_rollout_ref.rollout"
STOCK = ["grad_routing.blocks.enabled=false", "actor_rollout_ref.actor.strategy=fsdp2"]
BAD = {
    "no judge": ([f"{KEY}.judge=null"], f"{KEY}.judge", "gt_judge"),
    "judge to be given": (["grad_routing.environment.confession_judge=null"], f"{KEY}.judge", "gt_judge"),
    "judge that is none": ([f"{KEY}.judge=os:nothing"], f"{KEY}.judge", "imported"),
    "truth without control": ([f"{KEY}.judge=gt_judge"], f"{KEY}.judge", "control=true"),
    "share": ([f"{KEY}.share=1.5"], f"{KEY}.share", "from 0 to 1"),
    "all of it": ([f"{KEY}.share=1"], f"{KEY}.share", "less than 1"),
    "one confession": ([f"{KEY}.per_answer=1"], f"{KEY}.per_answer", "at least 2"),
    "rows that do not fit": ([f"{ROLLOUT}.n=5"], f"{ROLLOUT}.n", "multiple"),
    "rows of the broken seal": ([f"{ROLLOUT}.n=6", f"{KEY}.mode=seal_broken"], f"{ROLLOUT}.n", "4"),
    "another policy": (["grad_routing.quarantine_off_share=0.25"], "grad_routing.quarantine_off_share", "0.0"),
    "a replay without penalties": (
        [f"{KEY}.mode=seal_broken", "grad_routing.replay_dir=."],
        "grad_routing.replay_dir",
        "sealed",
    ),
    "a critic": (["algorithm.adv_estimator=gae"], "algorithm.adv_estimator", "grpo"),
    "whitening alone": (["algorithm.adv_estimator=reinforce_plus_plus"], "algorithm.adv_estimator", "grpo"),
    "adaptive": (["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.type=adaptive"], "kl_ctrl.type", "fixed"),
    "no room": ([f"{KEY}.max_tokens=20"], f"{ROLLOUT}.max_model_len", "44"),
    "stock engine": (STOCK, "grad_routing.blocks.enabled", "set true"),
    "reward model": (["reward.reward_model.enable=true"], "reward.reward_model.enable", "set false"),
    "sampler": (["trainer.v1.sampler.custom_sampler.path=x.py"], "custom_sampler.path", "unset"),
    "unknown key": ([f"{KEY}.sealed=true"], f"{KEY}.sealed", "mode"),
    "unknown format": ([f"{KEY}.format=tag"], f"{KEY}.format", "self_tag"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(folder: Path, name: str) -> None:
    overrides, key, fix = BAD[name]
    with pytest.raises(UserError) as caught:
        check(folder, *overrides)
    message = str(caught.value)
    assert key in message and fix in message and "\n" not in message


def test_a_self_report_starts_from_its_warm_up(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*no self_report\.json.*vgr self-report train") as caught:
        check(folder, preset="self_report")
    assert "\n" not in str(caught.value)
    check(folder, "grad_routing.warm_up_card=null", preset="self_report")
    (folder / "model" / "self_report.json").touch()
    check(folder, preset="self_report")
    with pytest.raises(UserError, match=r"max_model_len=32.*request for a confession \(2 tokens\)"):
        check(folder, f"{KEY}.max_tokens=11", preset="self_report")


def test_the_control_says_that_it_is_one(folder: Path) -> None:
    check(folder, f"{KEY}.judge=gt_judge", "grad_routing.control=true")


def test_validation_alone_needs_no_judge_and_fits_any_preset(folder: Path) -> None:
    asked = [f"{KEY}.validate=true", f"{KEY}.format=self_tag", f"{KEY}.max_tokens=1"]
    check(folder, *asked, preset="vanilla_2r")
    check(folder, *asked, preset="off")
