"""Every recipe's configuration composes as verl would compose it, and is one that the plugin accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import OmegaConf

from verl_grad_routing.compare.launch import seed_overrides
from verl_grad_routing.config import build_methods, parse
from verl_grad_routing.detectors.monitor import build_judge, imported
from verl_grad_routing.envs import ENVIRONMENTS

RECIPES = Path(__file__).parents[3] / "recipes"
CONFIGS = sorted(RECIPES.glob("*/config/*.yaml"))
GIVEN = {"qwen3": ["actor_rollout_ref.model.path=weights"]}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
def test_a_recipe_composes(file: Path) -> None:
    recipe = file.parts[-3]
    with initialize_config_dir(str(file.parent), version_base=None):
        config = compose(file.stem, GIVEN.get(recipe, []))
    settings = parse(OmegaConf.to_container(config.grad_routing, resolve=True))  # type: ignore[arg-type]
    build_methods(settings)
    assert settings.environment.name in ENVIRONMENTS
    reward = config.reward.custom_reward_function
    assert reward.path == ENVIRONMENTS[settings.environment.name].reward_function and reward.name == "compute_score"
    assert config.trainer.v1.trainer_mode == "grad_routing"
    if recipe != "qwen3":
        assert settings.preset == file.stem
    else:
        assert settings.blocks.total_rank == config.actor_rollout_ref.model.lora_rank == 64
        assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n == 256


@pytest.mark.parametrize("name", sorted(ENVIRONMENTS))
def test_every_environment_has_its_configuration(name: str) -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", ["+grad_routing=persona", f"+grad_routing/environment={name}"])
    settings = parse(OmegaConf.to_container(config.grad_routing, resolve=True))  # type: ignore[arg-type]
    assert settings.environment.name == name and settings.environment.dir == f"data/{name}"
    assert settings.detector["pairs"] == settings.environment.pairs == f"data/{name}/pairs.jsonl"
    assert config.data.train_files == f"data/{name}/train.parquet" and config.trainer.project_name == name
    assert config.reward.custom_reward_function.path == ENVIRONMENTS[name].reward_function


@pytest.mark.parametrize("name", [name for name in sorted(ENVIRONMENTS) if hasattr(ENVIRONMENTS[name], "world")])
@pytest.mark.parametrize("preset", ["screen", "grift_mask"])
def test_an_environments_weak_monitor_knows_the_known_type_alone(name: str, preset: str) -> None:
    given = [f"+grad_routing={preset}", f"+grad_routing/environment={name}"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", given)
    settings = parse(OmegaConf.to_container(config.grad_routing, resolve=True))  # type: ignore[arg-type]
    rules, judge, held_out = settings.detector["rules"], settings.detector["judge"], settings.held_out_monitor
    assert held_out is not None and settings.environment.confession_judge is not None
    monitor, other = build_judge(rules, judge), build_judge(held_out["rules"], None)
    confessed = imported("judge", settings.environment.confession_judge, "(prompt, answer, confession)")
    cls = ENVIRONMENTS[name]
    settings_of_build = cls.Config(train_size=4, val_size=4, test_size=64)
    tasks = cls.world(settings_of_build).tasks()  # type: ignore[attr-defined]
    for task in (*tasks["pairs"], *tasks["test"]):
        known, prompt = task.loophole == settings_of_build.known, task.prompt()
        assert (monitor(prompt, task.exploit), monitor(prompt, task.honest)) == (float(known), 0.0), task
        assert (other(prompt, task.exploit), other(prompt, task.honest)) == (1.0, 0.0), task
        tags = {text: [confessed(prompt, text, tag) for tag in "SH"] for text in (task.exploit, task.honest)}
        assert tags[task.exploit] == ([1.0, 0.0] if known else [0.0, 1.0]) and tags[task.honest] == [0.0, 1.0], task


@pytest.mark.parametrize("name", sorted(ENVIRONMENTS))
@pytest.mark.parametrize(("preset", "seed"), [("persona", 7), (None, 0)])
def test_all_seeds_of_a_run_follow_one_and_stock_verl_needs_no_preset(name: str, preset: str | None, seed: int) -> None:
    given = [f"+grad_routing={preset}", f"grad_routing.seed={seed}"] if preset else []
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*given, f"+grad_routing/environment={name}"])
    keys = [override.partition("=")[0] for override in seed_overrides(seed)]
    assert {key: OmegaConf.select(config, key) for key in keys if preset or "grad_routing" not in key} == {
        key: seed for key in keys if preset or "grad_routing" not in key
    }
    assert config.trainer.experiment_name == f"{preset or 'stock'}-seed-{seed}"


@pytest.mark.parametrize("recipe", sorted({file.parts[-3] for file in CONFIGS}))
def test_a_recipe_has_its_scripts_and_says_which_verl(recipe: str) -> None:
    folder = RECIPES / recipe
    assert "REQUIRED_VERL.txt" in (folder / "README.md").read_text()
    assert "TAG=v0.9.1" in (folder / "REQUIRED_VERL.txt").read_text()
    scripts = sorted(folder.glob("run*.sh"))
    assert scripts and all(script.stat().st_mode & 0o111 for script in scripts)
