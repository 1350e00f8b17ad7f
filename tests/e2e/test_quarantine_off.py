"""A share of the rollouts is sampled with the quarantine off and trained on the log-probs of that policy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import SMALL, Train
from verl_grad_routing.compare.runs import Run

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1000)]

STEPS = 4
LARGE = "actor_rollout_ref.actor.optim.lr=0.01"  # both blocks are far from their start after one step
KEEPS = "grad_routing.gate.keep=0.25"  # so that there are rows with a gate of their own among both kinds


def values(run: Run, key: str) -> list[float]:
    found = run.curve(key).values.tolist()
    assert len(found) == STEPS and all(math.isfinite(value) for value in found), (key, found)
    return found


@pytest.mark.parametrize(
    ("name", "settings", "groups"),
    [
        ("prompt", ["grad_routing.quarantine_off_unit=prompt"], [8, 8, 8, 8]),
        ("rollout", ["grad_routing.quarantine_off_unit=rollout"], [2, 2, 2, 2, 6, 6, 6, 6]),
        ("request", ["+grad_routing/rollout=two_adapters"], [8, 8, 8, 8]),
    ],
)
def test_log_probs_are_those_of_the_policy_that_sampled(
    name: str, settings: list[str], groups: list[int], train: Train, tmp_path: Path
) -> None:
    share = ["grad_routing.quarantine_off_share=0.25", f"grad_routing.record_dir={tmp_path}"]
    run = train("persona", STEPS, *SMALL, LARGE, KEEPS, *share, *settings, name=f"quarantine-off-{name}")
    assert values(run, "quarantine_off/share") == [0.25] * STEPS
    assert max(values(run, "quarantine_off/log_prob_diff_max")) < 1e-3
    assert max(values(run, "training/rollout_probs_diff_max")) < 1e-3  # of both kinds
    if name == "request":
        assert not run.has("timing_s/quarantine_off_sync")
    else:
        assert min(values(run, "timing_s/quarantine_off_sync")) > 0
    assert min(values(run, "routing/update_norm/quarantine")[:-1]) > 0  # there was something to switch off
    for part in ("off", "on"):
        assert all(0 <= rate <= 1 for rate in values(run, f"hack/rate_quarantine_{part}"))
    batch = torch.load(tmp_path / "batch_000001.pt", weights_only=False)
    prompts = [key.rsplit("_", 2)[0] for key in batch["keys"]]
    assert sorted(prompts.count(prompt) for prompt in set(prompts)) == groups
    assert sum(prompt.endswith("-off") for prompt in prompts) == len(prompts) // 4
