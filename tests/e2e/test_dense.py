"""Dense blocks in real runs: whole weights reach vLLM, as trained and as deployed, and are what is exported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.answers import assert_same_answers, assert_same_log_probs, from_vllm, load, prompts_of, samples_of
from tests.e2e.conftest import SMALL, Train
from verl_grad_routing.cli import app
from verl_grad_routing.compare.runs import Run
from verl_grad_routing.deploy import export
from verl_grad_routing.deploy.expansion import Expand, expand
from verl_grad_routing.token_weights import Frequencies, save_weights

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

STEPS, OLD, NEW = 3, 384, 64
GIVEN = (
    *SMALL,
    "actor_rollout_ref.actor.optim.lr=0.002",  # so that a stale rollout engine would be seen
    "actor_rollout_ref.rollout.val_kwargs.temperature=0",
    f"trainer.save_freq={STEPS}",
    f"trainer.test_freq={STEPS}",
)
# Every token of known rollouts and of others has a route: a persona's scores of tokens, which are not zero by chance.
TOKENS = (
    "~grad_routing.detector",
    "+grad_routing.detector={name: persona_act, pairs: '${grad_routing.environment.pairs}', token_score: projection}",
    "~grad_routing.gate",
    "+grad_routing.gate={name: per_token, inner: {name: batch_quantile, route: 0.5, keep: 0.25}}",
)


def tokenizer_of(environment: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(environment / "model")


def assert_trained_and_exported(run: Run, environment: Path, folder: Path, sizes: dict[str, int]) -> None:
    """Something was routed, both blocks learned, vLLM sampled from them, and exports answer as the run validated."""
    keep, absorb, route = (run.curve(f"routing/share_{name}").values.tolist() for name in ("keep", "absorb", "route"))
    assert all(sum(step) == pytest.approx(1) for step in zip(keep, absorb, route, strict=True)) and max(route) > 0
    for block in ("deployed", "quarantine"):
        norms = run.curve(f"routing/grad_norm/{block}").values.tolist()
        assert len(norms) == STEPS and all(math.isfinite(norm) and norm > 0 for norm in norms)
    # the rollout engine's own log-probs are the trainer's, after steps that changed both
    assert max(run.curve("training/rollout_probs_diff_max").values.tolist()) < 0.02
    as_trained = {key for key in run.keys if key.startswith("val-core/")}
    assert as_trained and all(f"val/deployed/{key}" in run.keys for key in as_trained)
    tokenizer, checkpoint = tokenizer_of(environment), run.folder / "checkpoints" / f"global_step_{STEPS}"
    for blocks, view in (("both", "val"), ("deployed", "val/deployed")):
        done = export(checkpoint, folder / blocks, "hf", blocks)
        assert done.difference.maximum <= done.difference.limit and done.quarantine_effect > 0
        model, samples = load(done.folder), samples_of(run.folder, view, STEPS)
        assert model.config.intermediate_size == sizes[blocks]
        assert_same_answers(model, tokenizer, samples)
    # what is deployed, in a vLLM of its own
    prompts = prompts_of(tokenizer, samples)
    assert_same_log_probs(model, prompts, from_vllm(done.folder, prompts, folder / "vllm.json")[str(done.folder)])


def test_tokens_are_routed_into_an_expanded_models_new_units(train: Train, environment: Path, tmp_path: Path) -> None:
    """ERA's units by SGTM's labels of every token: expanded, trained, validated, and contracted again.

    Of SGTM's variants the one that stops gradients at units' outputs, as Cloud's routing does, on routed tokens, and
    masks parameters on kept ones.
    """
    wide = tmp_path / "expanded"
    assert expand(Expand(environment / "model", NEW, "0-2"), wide).difference < 1e-4
    units = ["grad_routing.blocks.units.mlp_units=expanded", "grad_routing.blocks.units.heads=null"]
    variant = "grad_routing.intervention.variant=gradient_routing"
    model = f"actor_rollout_ref.model.path={wide}"
    run = train("sgtm", STEPS, *GIVEN, *units, *TOKENS, variant, model, name="tokens-expanded")
    assert max(run.curve("routing/share_mixed").values.tolist()) > 0  # rollouts of several routes
    masses = [run.curve(f"routing/mass_{block}").values for block in ("quarantine", "deployed")]
    assert (masses[0] < masses[1]).all()  # kept tokens train the deployed block alone, all others both
    assert_trained_and_exported(run, environment, tmp_path, {"both": OLD + NEW, "deployed": OLD})


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sgtm", "cloud"])
def test_units_of_the_model_itself(preset: str, train: Train, environment: Path, tmp_path: Path) -> None:
    given = ["grad_routing.detector.false_positive_rate=0.25"]  # hacks are few at first: so that some are routed
    if preset == "cloud":  # letters weigh differently, by made-up counts
        names = tokenizer_of(environment)
        counts = torch.arange(len(names))
        file = tmp_path / "weights.parquet"
        save_weights(file, names.convert_ids_to_tokens(counts.tolist()), counts, counts.flip(0), Frequencies())
        given += [f"grad_routing.intervention.token_weights={file}", "grad_routing.intervention.alpha=-0.75"]
    batches = tmp_path / "batches"
    run = train(preset, STEPS, *GIVEN, *given, f"grad_routing.record_dir={batches}")
    assert_trained_and_exported(run, environment, tmp_path, {"both": OLD, "deployed": OLD})
    if preset == "sgtm":
        attack(run, batches, environment, tmp_path / "relearn")


def attack(run: Run, batches: Path, environment: Path, to: Path) -> None:
    """``vgr relearn`` takes such a checkpoint, and fine-tunes what is deployed of it on the run's own hacks."""
    from typer.testing import CliRunner

    checkpoint = run.folder / "checkpoints" / f"global_step_{STEPS}"
    given = ["relearn", checkpoint, "--to", to, "--hacks", batches, "--target", 1.0, "--steps", 10, "--every", 5]
    given += ["--validate", environment / "val.parquet", "--reward", "pkg://verl_grad_routing.envs.loopholes.reward"]
    # a handful of hacks in three small steps: learned alone, and not so fast that they are all that is left
    given += ["--lr", 1e-4, "--clean-share", 0, "--max-new-tokens", 7]
    result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 0, (result.output, result.exception)
    models = json.loads((to / "relearn.json").read_text())["models"]
    assert [model["name"] for model in models] == ["deployed", "model"]
    deployed = [point["hack"]["hits"] for point in models[0]["curve"]]
    assert len(deployed) == 3 and deployed[-1] > deployed[0]


@pytest.mark.slow
def test_expanded_trained_validated_and_contracted(train: Train, environment: Path, tmp_path: Path) -> None:
    """Expand-Route-Ablate as its preset has it."""
    wide = tmp_path / "expanded"
    assert expand(Expand(environment / "model", NEW, "0-2"), wide).difference < 1e-4
    given = ["grad_routing.detector.false_positive_rate=0.25", f"actor_rollout_ref.model.path={wide}"]
    run = train("era", STEPS, *GIVEN, *given)
    assert_trained_and_exported(run, environment, tmp_path, {"both": OLD + NEW, "deployed": OLD})
