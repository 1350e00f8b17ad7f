"""Directions in gradient space in real runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.e2e.answers import assert_same_answers, assert_same_log_probs, from_vllm, load, prompts_of, samples_of
from tests.e2e.conftest import SMALL, Train
from verl_grad_routing.compare.runs import Run
from verl_grad_routing.deploy import export
from verl_grad_routing.directions import load_pairs

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1000)]

STEPS = 3


def finite(run: Run, key: str) -> list[float]:
    values = run.curve(key).values.tolist()
    assert values and all(math.isfinite(value) for value in values), (key, values)
    return values


def test_persona_grad(train: Train, environment: Path, tmp_path: Path) -> None:
    """Every rollout is scored by its own gradient; the direction is taken anew and saved; vLLM loads the export."""
    wide = [given.replace("=4", "=16") if "batch_size=4" in given else given for given in SMALL]
    settings = ["grad_routing.detector.refresh_every=1", f"trainer.save_freq={STEPS}", f"trainer.test_freq={STEPS}"]
    settings += ["actor_rollout_ref.rollout.val_kwargs.temperature=0", "actor_rollout_ref.actor.optim.lr=0.005"]
    run = train("persona_grad", STEPS, *wide, *settings)
    assert all(0 <= value <= 1 for value in finite(run, "detector/auroc"))
    assert all(deviation > 0 for deviation in finite(run, "detector/score_std"))
    assert all(gap > 0 for gap in finite(run, "detector/pair_gap"))
    assert all(0 < cosine <= 1 for cosine in finite(run, "detector/refresh_cosine"))
    assert all(seconds > 0 for seconds in finite(run, "timing_s/gradient_scores"))
    shares = [finite(run, f"routing/share_{route}") for route in ("keep", "absorb", "route")]
    assert all(sum(step) == pytest.approx(1) for step in zip(*shares, strict=True)) and max(shares[2]) > 0
    file = run.folder / "checkpoints" / f"global_step_{STEPS}" / "grad_routing.pt"
    state = torch.load(file, weights_only=False)["detector"]
    assert load_pairs(str(file.with_name("pairs.jsonl"))).content_hash == state["direction"]["pairs_hash"]
    assert state["bottleneck"]["basis"] == "svd" and len(state["basis_digest_M"]) == 4 * 7
    assert state["direction"]["vectors_Ld"].shape == (28, 32) and len(state["direction"]["unwanted_scores_P"]) == 10
    assert_deployed_is_what_was_validated(run, environment / "model", tmp_path)


def assert_deployed_is_what_was_validated(run: Run, model: Path, folder: Path) -> None:
    """The exported adapter, in transformers and in vLLM, against the run's own validation as deployed."""
    done = export(run.folder / "checkpoints" / f"global_step_{STEPS}", folder / "deployed", "peft", "deployed")
    samples, tokenizer = samples_of(run.folder, "val/deployed", STEPS), AutoTokenizer.from_pretrained(model)
    adapted, prompts = load(model, done.folder), prompts_of(tokenizer, samples)
    assert_same_answers(adapted, tokenizer, samples)
    answers = from_vllm(model, prompts, folder / "out.json", done.folder)
    assert_same_log_probs(adapted, prompts, answers[str(done.folder)])
