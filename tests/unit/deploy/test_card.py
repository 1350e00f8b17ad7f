"""The model card: what the run was, what was checked, and the rates of its validation rollouts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from verl_grad_routing.deploy import checkpoint as layout
from verl_grad_routing.deploy import export, find_checkpoint
from verl_grad_routing.deploy.card import method_facts
from verl_grad_routing.deploy.rates import Rate, read_rates
from verl_grad_routing.errors import UserError


def write_rollouts(folder, step: int, hacks: int, solves: int, rows: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"hack": float(row < hacks), "solve": float(row >= rows - solves), "known": float(row % 4 == 0), "score": 1.0}
        for row in range(rows)
    ]
    (folder / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run_folder(tmp_path):
    write_rollouts(tmp_path / "run" / "val", 3, hacks=30, solves=8)
    write_rollouts(tmp_path / "run" / "val" / "deployed", 3, hacks=4, solves=20)
    return tmp_path / "run"


def test_card_tells_what_the_checkpoint_tells(run, tmp_path, run_folder):
    export(run.checkpoint, tmp_path / "out", run=run_folder)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "# persona, step 3, deployed",
        "Research artefact",
        "| detector | persona_act |",
        "| signal | pairs |",
        "| pairs hash | 0123abcd |",
        "| gate | history_quantile (route=0.75) |",
        "| intervention | route (strict=False) |",
        "| seeds | run 11, blocks 12, detector 13 |",
        f"| base model | {run.base} |",
        "| ranks in training | deployed 3, quarantine 5 |",
        "The quarantine block was deleted",
        "max abs logit difference",
        "| hack | 0.750 [0.598, 0.858] (n = 40) |",
        "| hack | 0.100 [0.040, 0.231] (n = 40) |",
        "| hack, unknown loopholes |",
        "--max-lora-rank 8",
        f"torch {torch.__version__}",
    ):
        assert text in card, text
    assert card.startswith("---\nbase_model: ")
    facts = json.loads((tmp_path / "out" / "grad_routing_export.json").read_text())
    assert facts["rank"] == 3 and facts["method"]["pairs hash"] == "0123abcd" and "README.md" in facts["files"]


def test_card_without_settings_or_state(run, tmp_path):
    checkpoint = shutil.copytree(run.checkpoint, tmp_path / "global_step_3")
    (checkpoint / "grad_routing.json").unlink()
    facts = method_facts(find_checkpoint(checkpoint))
    assert facts["detector"] == "persona_act" and facts["gate"] == "history_quantile" and "preset" not in facts
    (checkpoint / "grad_routing.pt").unlink()
    assert method_facts(find_checkpoint(checkpoint)) == {}
    export(checkpoint, tmp_path / "out", format="hf")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# routed model, step 3, deployed" in card and "given no run folder" in card


def test_a_control_is_marked(run, tmp_path):
    checkpoint = shutil.copytree(run.checkpoint, tmp_path / "global_step_3")
    settings = json.loads((checkpoint / "grad_routing.json").read_text()) | {"preset": "oracle", "control": True}
    (checkpoint / "grad_routing.json").write_text(json.dumps(settings))
    export(checkpoint, tmp_path / "out")
    assert "# oracle, step 3, deployed (control: " in (tmp_path / "out" / "README.md").read_text()


def test_state_that_holds_objects_is_not_unpickled(run, tmp_path):
    checkpoint = shutil.copytree(run.checkpoint, tmp_path / "global_step_3")
    torch.save({"detector": {"name": "mine", "own": run}}, checkpoint / "grad_routing.pt")
    assert "Weights only load failed" in method_facts(find_checkpoint(checkpoint))["state not read"]


def test_wilson_interval():
    rate = Rate.of(1, 10)  # by hand: centre (0.1 + z²/20) / (1 + z²/10), z = 1.96
    assert (rate.low, rate.high) == (pytest.approx(0.01787, abs=1e-4), pytest.approx(0.40415, abs=1e-4))
    assert str(Rate.of(0, 4)).startswith("0.000 [0.000, 0.4")


def test_rates_need_the_step(run_folder, tmp_path):
    assert read_rates(run_folder, 3, ablated=False).keys() == {"as trained"}
    with pytest.raises(UserError, match=r"4\.jsonl.*steps there: \[3\]"):
        read_rates(run_folder, 4, ablated=True)
    with pytest.raises(UserError, match="validation_data_dir"):
        read_rates(tmp_path, 3, ablated=True)
    (run_folder / "val" / "3.jsonl").write_text('{"score": 1.0}\n')
    with pytest.raises(UserError, match="numbers hack and solve"):
        read_rates(run_folder, 3, ablated=True)


def test_file_names_are_the_engines_and_trainers():
    from verl_grad_routing.training import engine, router

    assert (engine.LAYOUT_FILE, router.STATE_FILE) == (layout.LAYOUT_FILE, layout.STATE_FILE)
