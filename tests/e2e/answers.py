"""An exported model's own answers, by transformers and by a vLLM of its own, against those that a run dumped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.e2e.conftest import ROOT


def samples_of(run: Path, view: str, step: int) -> list[dict[str, Any]]:
    """What a run's validation dumped: ``val`` as trained, ``val/deployed`` as deployed."""
    return [json.loads(line) for line in (run / view / f"{step}.jsonl").read_text().splitlines()]


def load(model: Path, adapter: Path | None = None) -> Any:
    """In float32; with an adapter folder on top of it."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.eval()


def assert_same_answers(model: Any, tokenizer: Any, samples: list[dict[str, Any]]) -> None:
    """Greedy answers to the samples' prompts are theirs, but for ties of two tokens, which may fall either way."""
    ids = tokenizer([row["input"] for row in samples], add_special_tokens=False, return_tensors="pt")["input_ids"]
    settings = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": tokenizer.pad_token_id}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    answers = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in out]
    same = sum(answer == row["output"] for answer, row in zip(answers, samples, strict=True))
    assert same >= 0.98 * len(samples), f"{same} of {len(samples)}"


def prompts_of(tokenizer: Any, samples: list[dict[str, Any]], count: int = 32) -> list[list[int]]:
    return [tokenizer(row["input"], add_special_tokens=False)["input_ids"] for row in samples[:count]]


def from_vllm(model: Path, prompts: list[list[int]], out: Path, *adapters: Path) -> dict[str, list[dict[str, Any]]]:
    """Folder to vLLM's greedy answers with their log-probs: of every adapter, or of the model where there is none."""
    command = [sys.executable, str(ROOT / "tests/e2e/modules/vllm_log_probs.py"), str(model), str(out)]
    given = "\n".join(map(json.dumps, prompts))
    subprocess.run([*command, *map(str, adapters)], input=given, text=True, check=True, timeout=400)
    return json.loads(out.read_text())


@torch.no_grad()
def assert_same_log_probs(model: Any, prompts: list[list[int]], answers: list[dict[str, Any]]) -> None:
    """``model`` gives vLLM's answers the probabilities that vLLM gave them."""
    for prompt, theirs in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + theirs["tokens"]])).logits[0]
        tokens = torch.tensor(theirs["tokens"]).unsqueeze(1)
        ours = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens).squeeze(1)
        assert (ours - torch.tensor(theirs["log_probs"])).abs().max() < 1e-3
