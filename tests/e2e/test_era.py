"""Expand-Route-Ablate in a real run: an expanded model is sampled by vLLM, trained, validated, and contracted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import ROOT, SMALL, Train
from verl_grad_routing.deploy import export
from verl_grad_routing.deploy.expansion import Expand, expand

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1000)]

STEPS, OLD, NEW = 3, 384, 64
LOUD = "actor_rollout_ref.actor.optim.lr=0.002"  # so that a stale rollout engine would be seen


def test_expanded_trained_validated_and_contracted(train: Train, environment: Path, tmp_path: Path) -> None:
    base, wide = environment / "model", tmp_path / "expanded"
    assert expand(Expand(base, NEW, "0-2"), wide).difference < 1e-4
    greedy = "actor_rollout_ref.rollout.val_kwargs.temperature=0"
    model = f"actor_rollout_ref.model.path={wide}"
    run = train("era", STEPS, *SMALL, LOUD, greedy, model, f"trainer.save_freq={STEPS}", f"trainer.test_freq={STEPS}")
    for block in ("deployed", "quarantine"):
        norms = run.curve(f"routing/grad_norm/{block}").values.tolist()
        assert len(norms) == STEPS and all(math.isfinite(norm) and norm > 0 for norm in norms)
    # the rollout engine's own log-probs are the trainer's, after steps that changed both blocks
    assert max(run.curve("training/rollout_probs_diff_max").values.tolist()) < 0.02
    checkpoint = run.folder / "checkpoints" / f"global_step_{STEPS}"
    for blocks, view, size in (("both", "val", OLD + NEW), ("deployed", "val/deployed", OLD)):
        done = export(checkpoint, tmp_path / blocks, "hf", blocks)
        assert done.difference.maximum <= done.difference.limit and done.quarantine_effect > 0
        samples = [json.loads(line) for line in (run.folder / view / f"{STEPS}.jsonl").read_text().splitlines()]
        loaded, tokenizer = load(done.folder)
        assert loaded.config.intermediate_size == size
        answers = of_transformers(loaded, tokenizer, [sample["input"] for sample in samples])
        same = sum(answer == sample["output"] for answer, sample in zip(answers, samples, strict=True))
        assert same >= 0.98 * len(samples), blocks  # a tie between two tokens may fall either way
    # the contracted model, in a vLLM of its own
    prompts = [tokenizer(sample["input"], add_special_tokens=False)["input_ids"] for sample in samples[:32]]
    for prompt, theirs in zip(prompts, of_vllm(done.folder, prompts, tmp_path / "vllm.json"), strict=True):
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor([prompt + theirs["tokens"]])).logits[0]
        tokens = torch.tensor(theirs["tokens"]).unsqueeze(1)
        ours = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens).squeeze(1)
        assert (ours - torch.tensor(theirs["log_probs"])).abs().max() < 1e-3


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, both from the exported folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def of_transformers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    ids = tokenizer(prompts, add_special_tokens=False, return_tensors="pt")["input_ids"]
    settings = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": tokenizer.pad_token_id}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in out]


def of_vllm(folder: Path, prompts: list[list[int]], out: Path) -> list[dict]:
    command = [sys.executable, str(ROOT / "tests/e2e/modules/vllm_log_probs.py"), str(folder), str(out)]
    subprocess.run(command, input="\n".join(map(json.dumps, prompts)), text=True, check=True, timeout=400)
    return json.loads(out.read_text())[str(folder)]
