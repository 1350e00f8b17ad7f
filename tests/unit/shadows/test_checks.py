"""What a run with methods in shadow is refused for, before Ray starts."""

from __future__ import annotations

import pytest

from tests.unit.training.test_checks import check
from tests.unit.training.test_checks import folder as folder
from verl_grad_routing.errors import UserError

pytestmark = pytest.mark.timeout(180)

KEY = "grad_routing.compare"
BYPASS = ["algorithm.rollout_correction.bypass_mode=true", "actor_rollout_ref.actor.use_kl_loss=false"]
SOFT = ["grad_routing.intervention.name=mask_advantage", "+grad_routing.intervention.soft=true"]
GRADIENTS = ["grad_routing.compare=[random]", "grad_routing.compare_gradients_every=5"]
BAD = {
    "soft mask of a projection": (
        [*(f"~grad_routing.intervention.{key}" for key in ("strict", "clamp_keep_advantages")), *SOFT],
        "grad_routing.intervention.name='mask_advantage'",
        "not in [0, 1]",
    ),
    "nothing to compare with": (["grad_routing.compare_gradients_every=2"], "compare_gradients_every=2", KEY),
    "a method on units in shadow of adapters": (
        ["grad_routing.compare=[cloud]"],
        f"{KEY}.cloud: grad_routing.intervention.name='cloud'",
        "adapters have no units",
    ),
    "gradients of rollouts in shadow of sequence parallelism": (
        ["grad_routing.compare=[persona_grad]", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"],
        f"{KEY}.persona_grad: actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
        "set 1",
    ),
    "gradients beside confessions": (
        [
            *GRADIENTS,
            *(
                f"grad_routing.{key}"
                for key in ("control=true", "confessions.share=0.25", "confessions.judge=gt_judge")
            ),
        ],
        "compare_gradients_every=5",
        "set 0 with confessions",
    ),
    "gradients beside another loss": (
        [*GRADIENTS, "grad_routing.blocks.hooks=[{name: l1_activations, weight: 0.1}]"],
        "compare_gradients_every=5",
        "set 0 with the hook l1_activations",
    ),
    "a soft mask in shadow": (
        ["grad_routing.compare=[{name: random, intervention: {name: mask_advantage, soft: true}}]"],
        f"{KEY}.random: grad_routing.intervention.name='mask_advantage'",
        "not in [0, 1]",
    ),
    "layers of a shadow": (
        ["grad_routing.compare=[{name: random, detector: {layers: [9]}}]"],
        f"{KEY}.random: grad_routing.detector.layers=[9]",
        "1 to 4",
    ),
    "pairs of a shadow": (
        ["grad_routing.compare=[{name: advantage_modification, detector: {pairs: nowhere.jsonl}}]"],
        f"{KEY}.advantage_modification: ",
        "no such file",
    ),
    "groups of one": (
        ["grad_routing.compare=[advantage_modification]", "actor_rollout_ref.rollout.n=1"],
        f"{KEY}.advantage_modification: actor_rollout_ref.rollout.n=1",
        "at least 2",
    ),
    "too few rollouts for grift": (
        ["grad_routing.compare=[grift]", "data.train_batch_size=1"],
        f"{KEY}.grift: grad_routing.detector.min_positives=16",
        "at most",
    ),
    "a gate without pairs": (
        ["grad_routing.compare=[{name: random, gate: {name: pair_midpoint}}]"],
        f"{KEY}.random: grad_routing.gate.name='pair_midpoint'",
        "contrastive pairs",
    ),
    "a pass that is skipped": (
        ["grad_routing.detector.score_pass=ablated", "grad_routing.compare=[random]", *BYPASS],
        f"{KEY}.random: algorithm.rollout_correction.bypass_mode",
        "log-prob pass",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, folder) -> None:
    overrides, key, fix = BAD[case]
    with pytest.raises(UserError) as told:
        check(folder, *overrides)
    assert key in str(told.value) and fix in str(told.value) and "\n" not in str(told.value), str(told.value)


def test_shadows_need_blocks(folder) -> None:
    with pytest.raises(UserError, match=r"compare=\['random'\].*vanilla_2r"):
        check(folder, "grad_routing.compare=[random]", preset="off")


def test_shadows_of_every_kind_pass(folder) -> None:
    check(folder, "grad_routing.compare=[advantage_modification,grift,random,monitor_penalty,oracle]")
    check(folder, "grad_routing.compare=[persona]", "grad_routing.compare_gradients_every=5", preset="vanilla_2r")
