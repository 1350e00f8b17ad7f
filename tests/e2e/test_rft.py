"""A real rejection fine-tuning: transformers samples, verl's SFT trainer learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_grad_routing.cli import app
from verl_grad_routing.envs.chars.model import rates
from verl_grad_routing.envs.chars.task import NEUTRAL
from verl_grad_routing.envs.loopholes.settings import Settings
from verl_grad_routing.envs.loopholes.text import LoopholesWorld

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


def test_fine_tuning_on_what_the_filter_leaves(environment: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from typer.testing import CliRunner

    given = ["rft", environment / "model", "--data", environment / "train.parquet", "--to", tmp_path / "out"]
    # a rule about letters, digits and marks: at the start the two clusters are not hacks and the others
    given += ["--rule", "^[a-h!?0-9]", "--detector", "num_layers=2", "--detector", "min_silhouette=-1"]
    given += ["--prompts", 256, "--samples", 2, "--temperature", 1, "--max-tokens", 7, "--keep", 64, "--lr", 1e-4]
    result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "out" / "rft.json").read_text())
    assert found["samples"] == 512
    assert found["kept"] == 64 <= found["predicted_clean"] < found["correct"] < 512
    assert found["hack_kept"] < found["hack_correct"]
    assert found["steps"] == 4 and not found["control"]
    assert len((tmp_path / "out" / "kept.jsonl").read_text().splitlines()) == 64
    before, after = (
        AutoModelForCausalLM.from_pretrained(p) for p in (environment / "model", tmp_path / "out" / "model")
    )
    moved = [not a.equal(b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    world = LoopholesWorld(Settings(seed=1))
    stream = world.stream("rft")
    types = ("leak", "blank", "sentinel", "wildcard")
    tasks = [world.draw(stream, types[row % len(types)], set(), "val") for row in range(64)]
    assert rates(after, tokenizer, world, tasks, NEUTRAL, samples=64)["solve"] > 0.2  # it still sorts
