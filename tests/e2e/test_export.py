"""What is exported is what was validated: in vLLM and in transformers, as trained and as deployed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.answers import assert_same_answers, assert_same_log_probs, from_vllm, load, prompts_of, samples_of
from tests.e2e.conftest import RecipeRun
from verl_grad_routing.deploy import export

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

BLOCKS = {"deployed": "val/deployed", "both": "val"}
STEP = 4


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
    folder = folders[request.param]
    return folder, load(environment / "model", folder), samples_of(recipe_run.folder, BLOCKS[request.param], STEP)


@pytest.fixture(scope="module")
def tokenizer(environment: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(environment / "model")


def test_the_runs_own_validation_came_from_these_weights(exported, tokenizer) -> None:
    _, model, samples = exported
    assert_same_answers(model, tokenizer, samples)


def test_as_trained_and_as_deployed_answer_differently(recipe_run: RecipeRun) -> None:
    trained, deployed = (
        {row["input"]: row["output"] for row in samples_of(recipe_run.folder, view, STEP)} for view in BLOCKS.values()
    )
    assert trained.keys() == deployed.keys()
    assert sum(trained[prompt] != deployed[prompt] for prompt in trained) >= 0.2 * len(trained)


@pytest.fixture(scope="module")
def answers(folders, recipe_run: RecipeRun, tokenizer, environment: Path, tmp_path_factory):
    """(prompts as tokens, adapter folder to vLLM's greedy answers to them with their log-probs)."""
    prompts = prompts_of(tokenizer, samples_of(recipe_run.folder, "val", STEP))
    out = tmp_path_factory.mktemp("vllm") / "out.json"
    return prompts, from_vllm(environment / "model", prompts, out, *folders.values())


def test_vllm_and_transformers_agree_on_the_exported_adapter(exported, answers) -> None:
    folder, model, _ = exported
    prompts, theirs = answers
    assert_same_log_probs(model, prompts, theirs[str(folder)])
