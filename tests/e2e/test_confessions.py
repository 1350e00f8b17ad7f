"""Confessions in a real run: sampled by vLLM within the step, trained beside answers, asked for at validation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import SMALL, Train
from verl_grad_routing.compare.runs import Run

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1000)]

STEPS = 3
SHARE = "grad_routing.confessions.share=0.5"
RATES = ("reward_mean", "rate", "unparsable", "accuracy")


def finite(run: Run, key: str) -> list[float]:
    values = run.curve(key).values.tolist()
    assert values and all(math.isfinite(value) for value in values), (key, values)
    return values


def test_confessions_are_samples_of_the_step(train: Train, tmp_path: Path) -> None:
    record = tmp_path / "batches"
    given = [SHARE, f"grad_routing.record_dir={record}", f"trainer.test_freq={STEPS}"]
    run = train("confessions", STEPS, *SMALL, *given)
    for key in RATES:
        assert all(0 <= value <= 1 for value in finite(run, f"confession/{key}")), key
    assert all(math.isfinite(value) for value in finite(run, "confession/pg_loss"))
    # rollout log-probs of every row, confessions among them, are those of the policy that is about to be trained
    assert max(finite(run, "training/rollout_probs_diff_max")) < 0.01
    validated = {key: finite(run, f"val/confession/{key}")[0] for key in ("rate", "accepted", "hack_accepted")}
    assert validated["rate"] + validated["accepted"] <= 1 and validated["hack_accepted"] <= validated["accepted"]
    seen = 0
    for step in range(1, STEPS + 1):
        batch = torch.load(record / f"batch_{step:06d}.pt", weights_only=False)
        assert len(batch["keys"]) == 4 * 8  # as many rows as without confessions
        for key, tag, prompt in zip(batch["keys"], batch["tags"], batch["fields"]["prompts"].unbind(), strict=True):
            if tag.get("confession"):
                seen += 1
                assert ":" in key and 13 < len(prompt) == tag["prompt_len"]
    assert seen == sum(finite(run, "confession/count")) > 0


def test_the_broken_seal(train: Train) -> None:
    run = train(
        "seal_broken", STEPS, *SMALL, SHARE, "grad_routing.confessions.judge=gt_judge", "grad_routing.control=true"
    )
    assert all(0 <= value <= 1 for value in finite(run, "confession/penalty_mean"))
    assert all(0 <= value <= 1 for value in finite(run, "confession/reward_mean"))
