"""A basis from pairs in a real run, with the sparsity term and blocks optimised apart."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, Train
from verl_grad_routing.commands.contrast import make_contrast
from verl_grad_routing.routing import save_contrast

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1000)]

STEPS = 3


def test_scorda_trains_and_is_validated_as_deployed(environment: Path, train: Train, tmp_path: Path) -> None:
    file = tmp_path / "contrast.safetensors"
    save_contrast(make_contrast(environment / "model", str(environment / "pairs.jsonl")), file)
    settings = [
        f"grad_routing.blocks.contrast={file}",
        "grad_routing.blocks.hooks=[{name: l1_activations, weight: 1e-3}]",
        "grad_routing.blocks.optim.decay_to_start=true",
        "grad_routing.blocks.optim.lr_ratio_quarantine=2",
        "actor_rollout_ref.actor.optim.lr=0.005",
        f"trainer.test_freq={STEPS}",
    ]
    run = train("scorda", STEPS, *SMALL, *settings)
    values = {key: run.curve(key).values.tolist() for key in run.keys}
    assert all(math.isfinite(value) for key in values if key.startswith("routing/") for value in values[key])
    # the rollout engine samples from the weights that are trained, basis included
    assert max(values["training/rollout_probs_diff_max"]) < 1e-3
    assert min(values["routing/update_norm/deployed"] + values["routing/update_norm/quarantine"]) > 0
    assert min(values["routing/l1_activations/per_token"]) > 0
    assert values["routing/lr/quarantine"] == [2 * rate for rate in values["routing/lr/deployed"]]
    as_trained = {key for key in values if key.startswith("val-core/")}
    assert as_trained and all(f"val/deployed/{key}" in values for key in as_trained)
