"""Every recipe's configuration composes as verl would compose it, and is one that the plugin accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from verl_grad_routing.config import build_methods, parse
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


@pytest.mark.parametrize("recipe", sorted({file.parts[-3] for file in CONFIGS}))
def test_a_recipe_has_its_scripts_and_says_which_verl(recipe: str) -> None:
    folder = RECIPES / recipe
    assert "REQUIRED_VERL.txt" in (folder / "README.md").read_text()
    assert "TAG=v0.9.1" in (folder / "REQUIRED_VERL.txt").read_text()
    scripts = sorted(folder.glob("run*.sh"))
    assert scripts and all(script.stat().st_mode & 0o111 for script in scripts)
