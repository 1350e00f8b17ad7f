"""The rivals in real runs: one for each way that an intervention acts on a batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import LABELLED_BY_LETTERS, SHADOWS, SMALL, EngineKilled, Train
from verl_grad_routing.compare.runs import Run, load_run
from verl_grad_routing.deploy.changes import checkpoint_basis
from verl_grad_routing.subspaces import drift, load_basis
from verl_grad_routing.warm_up import WarmUp, warm_up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

STEPS = 3
RULES = "grad_routing.detector.rules=['^[a-h]']"
NORMS = ("routing/grad_norm/deployed", "routing/grad_norm/quarantine", "actor/pg_loss")


def finite(run: Run, key: str) -> list[float]:
    values = run.curve(key).values.tolist()
    assert values and all(math.isfinite(value) for value in values), (key, values)
    return values


def test_screening_by_fingerprints_takes_rollouts_out_of_the_step(engine_killed: EngineKilled) -> None:
    run = load_run(engine_killed.folder)
    assert finite(run, "grift/fingerprinted")[0] == 1.0 and finite(run, "timing_s/fingerprint")[0] > 0
    assert -1 <= finite(run, "grift/silhouette")[0] <= 1
    flagged, rejected = finite(run, "detector/share_flagged")[0], finite(run, "intervention/share_rejected")[0]
    # whether a cluster is flagged hangs on what was sampled; whatever is flagged is rejected, and some group is kept
    assert 0 <= flagged <= rejected < 1
    assert finite(run, "routing/share_absorb")[0] == 1.0
    batch = torch.load(engine_killed.record / "batch_000001.pt", weights_only=False)
    tokens = sum(int(mask.sum()) for mask in batch["fields"]["response_mask"].unbind())
    # what is rejected has left the mask that verl counts its denominators on, and that blocks are stepped by
    mass = finite(run, "routing/mass_deployed")[0]
    assert 0 < mass < tokens if rejected else mass == tokens


def test_one_engine_samples_with_and_without_the_quarantine(engine_killed: EngineKilled) -> None:
    """One of four prompts by an adapter of its own; its rollouts are trained on the log-probs of that policy."""
    run = load_run(engine_killed.folder)
    assert set(finite(run, "quarantine_off/share")) == {0.25}
    assert max(finite(run, "quarantine_off/log_prob_diff_max")) < 1e-3
    assert not run.has("timing_s/quarantine_off_sync")
    last = sorted(engine_killed.record.glob("batch_*.pt"))[-1]
    batch = torch.load(last, weights_only=False)
    adapters = [row["grad_routing_adapter"] for row in batch["fields"]["extra_fields"]]
    off = [key.rsplit("_", 2)[0].endswith("-off") for key in batch["keys"]]
    assert adapters == ["deployed" if row else "both" for row in off] and sum(off) == 8


def test_gradients_are_taken_once_more_uphill(engine_killed: EngineKilled) -> None:
    run = load_run(engine_killed.folder)
    first, second = (finite(run, f"routing/regularize_gradient/{key}") for key in ("grad_norm", "grad_norm_uphill"))
    assert first[0] > 0 and first[0] != second[0]


def test_blocks_of_another_form_reach_the_rollout_engine(engine_killed: EngineKilled) -> None:
    """Frozen parts and all: the second step's rollouts are of the weights that the first step left."""
    run = load_run(engine_killed.folder)
    assert min(finite(run, f"routing/update_norm/{block}")[0] for block in ("deployed", "quarantine")) > 0
    assert max(finite(run, "training/rollout_probs_diff_max")) < 1e-3


def test_rivals_score_the_same_rollouts_in_shadow(engine_killed: EngineKilled) -> None:
    """One modifies rewards by activations, one routes by each rollout's own gradient, one by labels of one type."""
    run = load_run(engine_killed.folder)
    for name in SHADOWS:
        for key in ("agreement", "advantage_mass_discarded"):
            assert all(-1e-9 <= value <= 1 for value in finite(run, f"compare/{name}/{key}"))
        assert finite(run, f"compare/{name}/seconds")[0] > 0


@pytest.mark.slow
def test_a_preset_with_a_hook(train: Train) -> None:
    run = train("gradient_regularization", STEPS, *SMALL)
    assert max(finite(run, "routing/regularize_gradient/grad_norm_uphill")) > 0  # a step's groups may be of one reward


@pytest.fixture(scope="module")
def basis(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("warm-up") / "basis.safetensors"
    warm_up(WarmUp(environment / "model", pairs=str(environment / "pairs.jsonl"), rank=5, limit_s=300), file)
    return file


@pytest.mark.slow
def test_updates_stay_in_the_warm_ups_directions(basis: Path, train: Train) -> None:
    settings = [f"grad_routing.blocks.hooks.0.basis={basis}", "grad_routing.blocks.hooks.0.project=update"]
    settings += ["grad_routing.hardware.ranks=2", f"trainer.save_freq={STEPS}"]
    run = train("tdga", STEPS, *SMALL, *settings)
    assert all(0 < share < 1 for share in finite(run, "routing/project_update/share_inside"))
    moved = checkpoint_basis(run.folder / "checkpoints" / f"global_step_{STEPS}", rank=5)
    # two blocks of rank 8 each have moved, and all of it lies in five directions
    assert min(drift(moved, load_basis(basis)).values()) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["advantage_modification", "monitor_penalty"])
def test_modified_rewards(preset: str, train: Train) -> None:
    run = train(preset, STEPS, *SMALL, *([RULES] if preset == "monitor_penalty" else []))
    changes = finite(run, "intervention/reward_change")
    assert max(changes) <= 0  # none where whatever is flagged had no reward
    assert min(changes) < 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["grift_mask", "grift_filter"])
def test_gradient_fingerprints(preset: str, train: Train) -> None:
    """Every rollout is fingerprinted, labelled by a rule that has nothing to do with hacking, and acted upon."""
    run = train(preset, STEPS, *SMALL, *LABELLED_BY_LETTERS)
    assert finite(run, "grift/fingerprinted") == [1.0] * STEPS
    assert all(-1 <= value <= 1 for value in finite(run, "grift/silhouette"))
    assert min(finite(run, "grift/abstain")) == 0, finite(run, "grift/abstain_reason")
    assert all(seconds > 0 for seconds in finite(run, "timing_s/fingerprint"))
    key = "advantage_mass_removed" if preset == "grift_mask" else "share_rejected"
    assert max(finite(run, f"intervention/{key}")) > 0


@pytest.mark.slow
def test_masked_advantages(train: Train) -> None:
    mask = "~grad_routing.intervention", "+grad_routing.intervention={name: mask_advantage}"
    run = train("screen", STEPS, *SMALL, RULES, *mask, name="mask_advantage")
    assert all(0 <= share < 1 for share in finite(run, "intervention/advantage_mass_removed"))
    assert max(finite(run, "intervention/advantage_mass_removed")) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        ("grift_mask", ("grift/silhouette", "grift/smallest_cluster", "intervention/advantage_mass_removed")),
        ("tdga", ("routing/project_update/share_inside", "routing/project_update/share_kept")),
    ],
)
def test_two_ranks_agree_with_one(
    preset: str, keys: tuple[str, ...], basis: Path, train: Train, tmp_path: Path
) -> None:
    """The same recorded batch on one rank and on two: fingerprints, verdicts, projections and gradients."""
    settings = LABELLED_BY_LETTERS if preset == "grift_mask" else [f"grad_routing.blocks.hooks.0.basis={basis}"]
    one = train(preset, 1, *SMALL, *settings, f"grad_routing.record_dir={tmp_path}", name=f"{preset}-one")
    ranks = [f"grad_routing.replay_dir={tmp_path}", "grad_routing.hardware.ranks=2"]
    two = train(preset, 1, *SMALL, *settings, *ranks, name=f"{preset}-two")
    for key in (*keys, *NORMS):
        assert finite(two, key) == pytest.approx(finite(one, key), rel=1e-3, abs=1e-6), key


@pytest.mark.slow
def test_routes_of_tokens(train: Train) -> None:
    """Some tokens are kept, some routed; the run validates as deployed, and its checkpoint has the tokens' history."""
    settings = ["grad_routing.gate.inner.route=0.4", "grad_routing.gate.inner.keep=0.2", "trainer.save_freq=2"]
    run = train("persona_token", STEPS, *SMALL, *settings, f"trainer.test_freq={STEPS}", "data.val_max_samples=16")
    shares = [finite(run, f"routing/share_{route}") for route in ("keep", "absorb", "route")]
    assert all(sum(step) == pytest.approx(1) and min(step) > 0 for step in zip(*shares, strict=True))
    assert all(0 < share <= 1 for share in finite(run, "routing/share_mixed"))
    assert finite(run, "gate/history_size")[0] > 32  # 32 rollouts
    tokens = finite(run, "detector/token_score_mean")
    assert tokens[0] == pytest.approx(finite(run, "detector/score_mean")[0], abs=1.0)
    deployed, quarantine = (finite(run, f"routing/mass_{block}") for block in ("deployed", "quarantine"))
    for step, (keep, _, route) in enumerate(zip(*shares, strict=True)):
        total = deployed[step] / (1 - route)  # the deployed block learns from all tokens but the routed ones
        assert quarantine[step] == pytest.approx(total * (1 - keep), rel=1e-6)
    assert abs(finite(run, "actor/ppo_kl")[0]) < 1e-3  # old log-probs are those of the tokens' own gates
    assert any(key.startswith("val/deployed/") for key in run.keys)
    saved = torch.load(run.folder / "checkpoints" / "global_step_2" / "grad_routing.pt", weights_only=False)
    assert len(saved["gate"]["inner"]["history"]) == finite(run, "gate/history_size")[1]
