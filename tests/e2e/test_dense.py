"""Dense blocks in real runs: whole weights reach vLLM, as trained and as deployed, and are what is exported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import SMALL, Train
from verl_grad_routing.deploy import export
from verl_grad_routing.token_weights import Frequencies, save_weights

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

STEPS = 3
LOUD = "actor_rollout_ref.actor.optim.lr=0.002"  # so that a stale rollout engine would be seen


@pytest.mark.parametrize("preset", ["sgtm", pytest.param("cloud", marks=pytest.mark.slow)])
def test_whole_weights_reach_the_rollout_engine_and_the_export(
    preset: str, train: Train, environment: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(environment / "model")
    weights = []
    if preset == "cloud":  # letters weigh differently, by made-up counts
        counts = torch.arange(len(tokenizer))
        file = tmp_path / "weights.parquet"
        save_weights(file, tokenizer.convert_ids_to_tokens(counts.tolist()), counts, counts.flip(0), Frequencies())
        weights = [f"grad_routing.intervention.token_weights={file}", "grad_routing.intervention.alpha=-0.75"]
    greedy = "actor_rollout_ref.rollout.val_kwargs.temperature=0"
    given = [LOUD, greedy, f"trainer.save_freq={STEPS}", f"trainer.test_freq={STEPS}", *weights]
    run = train(preset, STEPS, *SMALL, *given)
    norms = run.curve("routing/grad_norm/deployed").values.tolist()
    assert len(norms) == STEPS and all(math.isfinite(norm) and norm > 0 for norm in norms)
    # the rollout engine's own log-probs are the trainer's, after steps that changed both
    assert max(run.curve("training/rollout_probs_diff_max").values.tolist()) < 0.02
    for blocks, view in {"both": "val", "deployed": "val/deployed"}.items():
        checkpoint = run.folder / "checkpoints" / f"global_step_{STEPS}"
        export(checkpoint, tmp_path / blocks, "hf", blocks)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / blocks, dtype=torch.float32).eval()
        samples = [json.loads(line) for line in (run.folder / view / f"{STEPS}.jsonl").read_text().splitlines()]
        prompts = [sample["input"] for sample in samples]
        ids = tokenizer(prompts, add_special_tokens=False, return_tensors="pt")["input_ids"]
        settings = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": tokenizer.pad_token_id}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        answers = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in out]
        same = sum(answer == sample["output"] for answer, sample in zip(answers, samples, strict=True))
        assert same >= 0.98 * len(samples)  # a tie between two tokens may fall either way
