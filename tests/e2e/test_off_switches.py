"""Methods switched off in real runs: on vanilla's recorded batches, vanilla's weights bit for bit.

The fast account of every method is tests/engine/test_off_switches.py; this one has verl's passes, workers and weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.e2e.checkpoints import ACTOR, MODEL, OPTIMIZER, assert_moved, assert_same, saved
from tests.e2e.conftest import SEEDED, SMALL, Train
from verl_grad_routing.compare.runs import Run
from verl_grad_routing.subspaces import Basis, Subspace, save_basis

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1000)]

STEPS = 2
SAVED = [*SMALL, SEEDED, "trainer.save_freq=1"]
NOBODY = ["~grad_routing.gate", "+grad_routing.gate={name: absorb_all}"]
HOOKS = "{name: regularize_gradient, gamma: 0.0}, {name: l1_activations, weight: 0.0}"
OFF = {
    "tdga": [f"grad_routing.blocks.hooks=[{{name: project_update, basis: BASIS, rank: null, weights: ones}}, {HOOKS}]"],
    "advantage_modification": ["grad_routing.intervention.alpha=0.0"],
    "monitor_penalty": ["grad_routing.intervention.penalty=0.0"],
    "screen": ["grad_routing.detector.recall=0.0"],
    "grift_mask": ["grad_routing.detector.positive_reward=0", "grad_routing.detector.min_silhouette=1"],
    "confessions": ["grad_routing.confessions.share=0.0"],
    "self_report": ["grad_routing.warm_up_card=null"],
    "persona": NOBODY,
    "persona_grad": NOBODY,
}


@pytest.fixture(scope="module")
def vanilla(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    record = tmp_path_factory.mktemp("vanilla-batches")
    return train("vanilla_2r", STEPS, *SAVED, f"grad_routing.record_dir={record}", name="recorded-vanilla"), record


def every_direction(model: Path, to: Path) -> Path:
    """A basis in which nothing is left out: all output directions of every linear layer."""
    subspaces = {}
    with safe_open(model / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith("_proj.weight"):
                outputs = file.get_slice(name).get_shape()[0]
                subspaces[name.removesuffix(".weight")] = Subspace(torch.eye(outputs), torch.ones(outputs))
    save_basis(Basis(subspaces), to)
    return to


@pytest.mark.parametrize("preset", OFF)
def test_off_is_vanilla_bit_for_bit(
    preset: str, vanilla: tuple[Run, Path], environment: Path, train: Train, tmp_path: Path
) -> None:
    plain, record = vanilla
    basis = every_direction(environment / "model", tmp_path / "basis.safetensors")
    off = [setting.replace("BASIS", str(basis)) for setting in OFF[preset]]
    run = train(preset, STEPS, *SAVED, f"grad_routing.replay_dir={record}", *off, name=f"off-{preset}")
    ours, theirs = (one.folder / "checkpoints" / f"global_step_{STEPS}" / ACTOR for one in (run, plain))
    for name in (MODEL, OPTIMIZER):
        assert_same(saved(ours, name), saved(theirs, name), name)
    assert_moved(ours, plain.folder / "checkpoints" / "global_step_1" / ACTOR, "lora_B")
