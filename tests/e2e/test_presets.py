"""Three steps of every preset that no other run here trains, validated at the end."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, SMALL, Train
from verl_grad_routing.commands.contrast import make_contrast
from verl_grad_routing.routing import save_contrast

STEPS = 3
OWN_GROUPS = ("routing/", "intervention/", "actor/")
# and a metric that says its signal was read
PRESETS = {
    "random": "detector/score_std",
    "coinflip": "gate/history_size",
    "random_grad": "timing_s/gradient_scores",
    "pissa": "detector/pair_gap",
    "corda": "detector/pair_gap",
    "scorda_rev": "routing/update_share/quarantine",
    "antipasto": "detector/pair_gap",
    "labels_partial": "detector/recall",
    "strict": "detector/recall",
    "retain_pass": "quarantine_off/log_prob_diff_max",
    "head_start": "intervention/head_start",
    "head_start_freeze": "intervention/head_start",
    "monitor_route": "detector/recall",
}
# what the log says of the blocks, where that is not the default
BLOCKS = {
    "pissa": "blocks: init pissa_split, ",
    "corda": "blocks: init corda, ",
    "scorda_rev": "blocks: init scorda_rev, ",
    "antipasto": "form antipasto, ",
}
# the others, by the file whose runs train them
ELSEWHERE = {
    "test_bases": "scorda",
    "test_compare": "off",
    "test_confessions": "confessions seal_broken",
    "test_dense": "sgtm cloud era",
    "test_efficacy": "absorb oracle",
    "test_gradients": "persona_grad",
    "test_methods": "advantage_modification gradient_regularization grift_filter grift_mask monitor_penalty "
    "persona_token screen tdga",
    "test_monitors": "inoculation probe_penalty",
    "test_off_switches": "vanilla_2r",
    "test_self_report": "self_report",
    "test_two_ranks": "persona",
}


@pytest.fixture(scope="module")
def contrast(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("contrast") / "contrast.safetensors"
    save_contrast(make_contrast(environment / "model", str(environment / "pairs.jsonl")), file)
    return file


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset: str, train: Train, contrast: Path) -> None:
    given = [f"grad_routing.blocks.contrast={contrast}"] if preset in ("corda", "scorda_rev") else []
    run = train(preset, STEPS, *SMALL, *given, f"trainer.test_freq={STEPS}", "data.val_max_samples=64")
    own = [key for key in run.keys if key.startswith(OWN_GROUPS)]
    for key in own:
        values = run.curve(key).values.tolist()
        assert all(math.isfinite(value) for value in values), (key, values)
    shares = [run.curve(f"routing/share_{route}").values.tolist() for route in ("keep", "absorb", "route")]
    assert [sum(step) for step in zip(*shares, strict=True)] == pytest.approx([1.0] * STEPS)
    assert PRESETS[preset] in run.keys, sorted(run.keys)
    assert BLOCKS.get(preset, "blocks: init random_orthogonal, ") in (run.folder / "log.txt").read_text()
    if preset == "strict":  # every token trains one block: an unflagged rollout's the deployed one alone
        masses = (run.curve(f"routing/mass_{block}").values for block in ("deployed", "quarantine"))
        tokens = 32 * run.curve("response_length/mean").values
        assert sum(masses).tolist() == pytest.approx(tokens.tolist())
    for deployed in (False, True):
        assert run.rates("last", deployed=deployed).overall.hack.total == 64


def test_every_preset_is_trained_by_some_run() -> None:
    conf, here = ROOT / "verl_grad_routing" / "conf" / "grad_routing", Path(__file__).parent
    elsewhere = {preset: file for file, presets in ELSEWHERE.items() for preset in presets.split()}
    assert elsewhere.keys() | PRESETS.keys() == {file.stem for file in conf.glob("[!_]*.yaml")}
    for preset, file in elsewhere.items():
        assert re.search(rf'["=]{preset}"', (here / f"{file}.py").read_text()), (preset, file)
