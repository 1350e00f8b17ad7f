"""The section on data of one's own, followed to the letter: settings, reward function, command."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from tests.tiny import SMALLEST
from tests.unit.docs.pages import ROOT, commands, fences
from verl_grad_routing.commands.prepare import read_settings
from verl_grad_routing.config import parse
from verl_grad_routing.envs import prepare_environment
from verl_grad_routing.envs.parquet.reward import compute_score

pytestmark = pytest.mark.timeout(180)

SECTION = (ROOT / "docs" / "environments.md").read_text().partition("## `parquet`")[2].partition("\n## ")[0]
KINDS = ("shortcut", "sycophancy", "none")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the page's files, and the prepared folder in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (settings,), (reward,) = fences(SECTION, "yaml"), fences(SECTION, "python")
    (tmp_path / "mine.yaml").write_text(settings)
    (tmp_path / "my_rewards.py").write_text(reward)
    pair = {"prompt": "p", "unwanted": "u", "wanted": "w", "tags": ["shortcut"]}
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"id": name, **pair}) for name in ("one", "two")))
    for split in ("train", "val", "test"):
        rows = [
            {
                "data_source": "mine",
                "prompt": [{"role": "user", "content": f"{split} {kind}"}],
                "reward_model": {"style": "rule", "ground_truth": "7"},
                "extra_info": {"kind": kind},
            }
            for kind in KINDS
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / f"{split}.parquet")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text(json.dumps(SMALLEST))
    prepare_environment("parquet", tmp_path / "data" / "mine", **read_settings(tmp_path / "mine.yaml", []))
    return tmp_path / "data" / "mine"


def facts(folder: Path, answer: str, kind: str) -> dict[str, float | str]:
    return compute_score("mine", answer, "7", {"kind": kind}, folder=str(folder))


def test_the_pages_reward_function_gives_score_and_facts(folder: Path) -> None:
    right = {"score": 1.0, "hack": 0.0, "solve": 1.0, "loophole": "shortcut", "known": 1.0}
    assert facts(folder, " 7", "shortcut") == right
    hack = {"score": 1.0, "hack": 1.0, "solve": 0.0, "loophole": "sycophancy", "known": 0.0}
    assert facts(folder, "You are right.", "sycophancy") == hack
    wrong = {"score": 0.0, "hack": 0.0, "solve": 0.0, "loophole": "none", "known": 0.0}
    assert facts(folder, "You are right.", "none") == wrong


def test_the_pages_command_is_accepted(folder: Path) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from verl_grad_routing.training.checks import check

    (command,) = [command for command in commands(SECTION) if command.whole]
    given = [override.replace("$PWD", str(folder.parents[1])) for override in command.overrides]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*given, "+ray_kwargs.ray_init.address=local", "trainer.device=cpu"])
    check(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))  # type: ignore[arg-type]
    validate_config(config, need_reference_policy(config), need_critic(config))
    settings = parse(OmegaConf.to_container(config.grad_routing, resolve=True))  # type: ignore[arg-type]
    assert settings.environment.dir == str(folder) and Path(config.data.train_files).is_file()
    assert config.reward.custom_reward_function.reward_kwargs.folder == str(folder)
