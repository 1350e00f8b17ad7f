"""What is exported is what was validated: in vLLM and in transformers, as trained and as deployed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import ROOT, RecipeRun
from verl_grad_routing.deploy import export

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

BLOCKS = {"deployed": "val/deployed", "both": "val"}


@pytest.fixture(scope="module")
def folders(recipe_run: RecipeRun, tmp_path_factory) -> dict[str, Path]:
    """Blocks to the adapter exported with them."""
    into = tmp_path_factory.mktemp("export")
    for blocks in BLOCKS:
        export(recipe_run.checkpoint, into / blocks, "peft", blocks)
    return {blocks: into / blocks for blocks in BLOCKS}


@pytest.fixture(scope="module", params=list(BLOCKS))
def exported(request, folders, recipe_run: RecipeRun, environment: Path):
    """(adapter folder, PEFT model, validation samples that the run's vLLM gave with these blocks)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = folders[request.param]
    base = AutoModelForCausalLM.from_pretrained(environment / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    lines = (recipe_run.folder / BLOCKS[request.param] / "4.jsonl").read_text().splitlines()
    return folder, model, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer(environment: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(environment / "model")


def greedy(model, tokenizer, prompts: list[str]) -> list[str]:
    ids = tokenizer(prompts, add_special_tokens=False, return_tensors="pt")["input_ids"]
    settings = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": tokenizer.pad_token_id}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in out]


def test_the_runs_own_validation_came_from_these_weights(exported, tokenizer) -> None:
    _, model, samples = exported
    answers = greedy(model, tokenizer, [sample["input"] for sample in samples])
    same = sum(answer == sample["output"] for answer, sample in zip(answers, samples, strict=True))
    assert same >= 0.98 * len(samples)  # a tie between two tokens may fall either way


def test_as_trained_and_as_deployed_answer_differently(recipe_run: RecipeRun) -> None:
    outputs = []
    for view in BLOCKS.values():
        lines = (recipe_run.folder / view / "4.jsonl").read_text().splitlines()
        outputs.append({json.loads(line)["input"]: json.loads(line)["output"] for line in lines})
    trained, deployed = outputs
    assert trained.keys() == deployed.keys()
    assert sum(trained[prompt] != deployed[prompt] for prompt in trained) >= 0.2 * len(trained)


@pytest.fixture(scope="module")
def from_vllm(folders, recipe_run: RecipeRun, tokenizer, environment: Path, tmp_path_factory):
    """(prompts as tokens, adapter folder to vLLM's greedy answers to them with their log-probs)."""
    lines = (recipe_run.folder / "val" / "4.jsonl").read_text().splitlines()[:32]
    prompts = [tokenizer(json.loads(line)["input"], add_special_tokens=False)["input_ids"] for line in lines]
    script, out = ROOT / "tests/e2e/modules/vllm_log_probs.py", tmp_path_factory.mktemp("vllm") / "out.json"
    subprocess.run(
        [sys.executable, script, environment / "model", out, *folders.values()],
        input="\n".join(map(json.dumps, prompts)),
        text=True,
        check=True,
        timeout=400,
    )
    return prompts, json.loads(out.read_text())


def test_vllm_and_transformers_agree_on_the_exported_adapter(exported, from_vllm) -> None:
    folder, model, _ = exported
    prompts, answers = from_vllm
    for prompt, theirs in zip(prompts, answers[str(folder)], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + theirs["tokens"]])).logits[0]
        tokens = torch.tensor(theirs["tokens"]).unsqueeze(1)
        ours = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens).squeeze(1)
        assert (ours - torch.tensor(theirs["log_probs"])).abs().max() < 1e-3
