"""A real relearning attack: on what an oracle's routing deploys, beside the model before RL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_grad_routing.cli import app
from verl_grad_routing.compare.swapped import swapped_rate

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1000)]

STEPS = 26  # of RL; enough to learn the hack, see test_efficacy


def test_hacks_of_the_run_bring_its_hacking_back(train, environment: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    run = train(
        "oracle",
        STEPS,
        f"trainer.test_freq={STEPS}",
        f"trainer.save_freq={STEPS}",
        "trainer.val_before_train=false",
        "grad_routing.validate_swapped=true",
        f"grad_routing.record_dir={tmp_path / 'batches'}",
        name="relearn",
    )
    lines = (run.folder / "val" / "swapped" / f"{STEPS}.jsonl").read_text().splitlines()
    dumped = [float(json.loads(line)["hack"]) for line in lines]
    assert swapped_rate(run, "hack") == pytest.approx(sum(dumped) / len(dumped))  # verl's name of it is ours
    assert 0 < run.curve("routing/update_share/quarantine").values.mean() < 1

    checkpoint = next(run.folder.rglob(f"global_step_{STEPS}"))
    given = ["relearn", checkpoint, "--to", tmp_path / "out", "--hacks", tmp_path / "batches"]
    given += ["--validate", environment / "val.parquet", "--reward", "pkg://verl_grad_routing.envs.loopholes.reward"]
    given += ["--steps", 20, "--every", 10, "--lr", 3e-4, "--max-new-tokens", 7]
    result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 0, (result.output, result.exception)
    print(result.output)
    found = json.loads((tmp_path / "out" / "relearn.json").read_text())
    trained = run.rates("last", deployed=False).overall.hack
    assert abs(found["goal"]["value"] - trained.value) < 0.1  # the same model, sampled again
    assert [model["name"] for model in found["models"]] == ["deployed", "model"]
    deployed = [point["hack"]["hits"] for point in found["models"][0]["curve"]]
    assert len(deployed) == 3 and found["models"][0]["curve"][0]["hack"]["rollouts"] == trained.total
    assert deployed[-1] > 2 * deployed[0]  # hacks are learned
    assert found["data"]["hacks"] > 100 and found["data"]["clean"] > 100
