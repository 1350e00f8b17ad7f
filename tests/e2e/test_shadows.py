"""Methods in shadow in real runs: what they say is logged, and no weight or random number differs for it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from tests.e2e.checkpoints import ACTOR, EXTRA, MODEL, OPTIMIZER, assert_moved, assert_same, saved
from tests.e2e.conftest import ROOT, SEEDED, SMALL, Train
from verl_grad_routing.compare.launch import quoted
from verl_grad_routing.compare.report import write_report
from verl_grad_routing.compare.runs import Run

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(2400)]

STEPS = 3
OUTSIDE = ROOT / "tests/modules/outside"
# every rollout is fingerprinted, and labelled by a rule that has nothing to do with hacking
GRIFT = "{name: grift, detector: {rules: ['^[a-h]'], positive_reward: 0, min_silhouette: -1, min_cluster_share: 0}}"
NAMES = ("advantage_modification", "grift", "random")
SHADOWS = [f"grad_routing.compare=[advantage_modification,{GRIFT},random]", "grad_routing.compare_gradients_every=1"]


def values(run: Run, key: str) -> list[float]:
    found = run.curve(key).values.tolist()
    assert found and all(math.isfinite(value) for value in found), (key, found)
    return found


def test_shadows_are_compared_and_change_nothing(train: Train, tmp_path: Path) -> None:
    """On the same batches: weights, optimizer, random state and verdicts are bitwise those of a run without."""
    record, settings = tmp_path / "batches", [*SMALL, SEEDED, "trainer.save_freq=1"]
    alone = train("persona", STEPS, *settings, f"grad_routing.record_dir={record}", name="alone")
    drawn = ["trainer.val_before_train=true", f"trainer.test_freq={STEPS}"]  # the report draws validations
    replay = f"grad_routing.replay_dir={record}"
    watched = train("persona", STEPS, *settings, replay, *SHADOWS, *drawn, name="watched")

    ours, theirs = (run.folder / f"checkpoints/global_step_{STEPS}" for run in (alone, watched))
    for name in (MODEL, OPTIMIZER, EXTRA):
        assert_same(saved(ours / ACTOR, name), saved(theirs / ACTOR, name), name)
    assert_moved(theirs / ACTOR, watched.folder / "checkpoints/global_step_1" / ACTOR, "lora_B")
    assert_same(*(torch.load(folder / "grad_routing.pt", weights_only=False) for folder in (ours, theirs)))
    assert set(torch.load(theirs / "grad_routing_compare.pt", weights_only=False)) == set(NAMES)
    same = [key for key in alone.keys if key.startswith(("routing/", "detector/", "gate/", "actor/pg_loss"))]
    assert len(same) > 10
    for key in same:  # rollouts arrive in another order, and sums round by it
        assert watched.curve(key).values.tolist() == pytest.approx(alone.curve(key).values.tolist(), rel=1e-12), key

    for name in NAMES:
        own = f"compare/{name}"
        assert all(-1 <= value <= 1 for value in values(watched, f"{own}/score_correlation"))
        for share in ("agreement", "share_flagged", "advantage_mass_discarded"):
            assert all(-1e-9 <= value <= 1 for value in values(watched, f"{own}/{share}"))
        assert len(values(watched, f"{own}/gradient_cosine")) == STEPS
        assert all(seconds > 0 for seconds in values(watched, f"{own}/seconds"))
    assert max(values(watched, "compare/random/gradient_cosine_deployed")) < 1  # it routes others than the persona
    assert min(values(watched, "compare/grift/abstain")) == 0
    assert all(value > 0 for value in values(watched, "compare/arm/advantage_mass_discarded"))
    page = write_report([watched.folder], tmp_path / "report").read_text()
    assert "What other methods said" in page and "Methods in shadow" in page


def test_a_method_of_another_package_as_the_arm_and_in_shadow(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by its entry point alone, in the driver and in every worker."""
    paths = os.pathsep.join([str(OUTSIDE), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", paths)
    arm = ["detector.name=repetition", "gate.name=threshold", "intervention.name=soften"]
    added = ["detector.least=3", "gate.route_above=0.0", "intervention.factor=0.25"]
    mine = "{name: mine, detector: {name: repetition, least: 5}, gate: {name: threshold, route_above: 0.5},"
    run = train(
        "vanilla_2r",
        STEPS,
        *SMALL,
        *(f"grad_routing.{setting}" for setting in arm),
        *(f"+grad_routing.{setting}" for setting in added),
        f"grad_routing.compare=[{mine} intervention: {{name: soften, factor: 0}}}},random]",
        f"++ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH={quoted(paths)}",
        name="outside",
    )
    assert max(values(run, "detector/share_flagged")) > 0
    assert max(values(run, "intervention/advantage_mass_removed")) > 0
    assert max(values(run, "compare/arm/advantage_mass_discarded")) > 0
    flagged = (values(run, key) for key in ("detector/share_flagged", "compare/mine/share_flagged"))
    assert all(theirs <= ours for ours, theirs in zip(*flagged, strict=True))
