"""Bases and forms of blocks in real runs: from pairs, with the sparsity term and blocks optimised apart; two-sided."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.answers import assert_same_answers, assert_same_log_probs, from_vllm, load, prompts_of, samples_of
from tests.e2e.conftest import SMALL, Train
from verl_grad_routing.commands.contrast import make_contrast
from verl_grad_routing.compare.runs import Run
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


BLOCKS = {"deployed": "val/deployed", "both": "val"}


@pytest.fixture(scope="module", params=["two_sided", "antipasto"])
def other_form(
    request, environment: Path, train: Train, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Run, dict[str, Path]]:
    """A form of blocks, its run with greedy validation at the end, and what was exported of it by ``vgr export``."""
    settings = [
        "grad_routing.blocks.init=pissa_split",
        f"grad_routing.blocks.form={request.param}",
        "actor_rollout_ref.actor.optim.lr=0.01",
        "actor_rollout_ref.rollout.val_kwargs.temperature=0",
        f"trainer.test_freq={STEPS}",
        f"trainer.save_freq={STEPS}",
    ]
    name = f"form-{request.param}"  # presets run in the same folder
    run = train("absorb", STEPS, *SMALL, *settings, name=name)  # every rollout trains both blocks
    folders = {blocks: tmp_path_factory.mktemp(request.param) / blocks for blocks in BLOCKS}
    checkpoint = run.folder / "checkpoints" / f"global_step_{STEPS}"
    for blocks, folder in folders.items():
        command = [sys.executable, "-m", "verl_grad_routing.cli", "export", checkpoint, "--to", folder]
        subprocess.run([*command, "--blocks", blocks], check=True, timeout=300)
    return request.param, run, folders


def test_other_forms_train_and_are_validated_as_deployed(other_form) -> None:
    form, run, _ = other_form
    values = {key: run.curve(key).values.tolist() for key in run.keys}
    assert all(math.isfinite(value) for key in values if key.startswith("routing/") for value in values[key])
    # the rollout engine samples from the weights that are trained, frozen parts included
    assert max(values["training/rollout_probs_diff_max"]) < 1e-3
    assert min(values["routing/update_norm/deployed"] + values["routing/update_norm/quarantine"]) > 0
    as_trained = {key for key in values if key.startswith("val-core/")}
    assert as_trained and all(f"val/deployed/{key}" in values for key in as_trained)
    assert f"blocks: init pissa_split, form {form}, " in (run.folder / "log.txt").read_text()


def test_exports_of_other_forms_are_what_was_validated(other_form, environment: Path, tmp_path: Path) -> None:
    """In transformers and in vLLM, as plain adapters: the run's own greedy answers, and log-probs that agree."""
    from transformers import AutoTokenizer

    _, run, folders = other_form
    tokenizer = AutoTokenizer.from_pretrained(environment / "model")
    samples = {blocks: samples_of(run.folder, view, STEPS) for blocks, view in BLOCKS.items()}
    prompts = prompts_of(tokenizer, samples["both"])
    answers = from_vllm(environment / "model", prompts, tmp_path / "out.json", *folders.values())
    for blocks, folder in folders.items():
        model = load(environment / "model", folder)
        assert_same_answers(model, tokenizer, samples[blocks])
        assert_same_log_probs(model, prompts, answers[str(folder)])
