"""Several detectors, one pass: who reads what, where each finds its columns, and who pays for a pass of its own."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_grad_routing.config import Methods
from verl_grad_routing.detectors import DETECTORS
from verl_grad_routing.shadows import Shadow

pytestmark = pytest.mark.timeout(180)

LAYERS, HIDDEN = 4, 8


@pytest.fixture
def trainer() -> Any:
    """The run's own random direction in the policy's pass; shadows in the same, in the reference's and in none."""
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.training.trainer.comparing import Comparing
    from verl_grad_routing.training.trainer.scoring import Reader

    made = object.__new__(Comparing)
    passes = {"own": "policy", "same": "policy", "frozen": "reference", "ablated": "ablated"}
    detectors = {}
    made.readers = []
    for index, (name, which) in enumerate(passes.items()):
        settings = {"name": "random", "direction_index": index, "layers": [1 + index % 2, 3], "score_pass": which}
        detectors[name] = DETECTORS.build(settings, "grad_routing.detector")
        detectors[name].fit(None, None, detectors[name].resolve_layers(LAYERS), HIDDEN)
        made.readers.append(Reader(detectors[name], detectors[name].resolve_layers(LAYERS), which, None))
    made.detector, made.routed, made._seconds = detectors["own"], True, defaultdict(float)
    made.shadows = [Shadow(n, {}, Methods(d, None, None)) for n, d in detectors.items() if n != "own"]
    made.asked = []
    made._log_prob_pass = lambda batch, extra: made.asked.append(extra)
    return made


def test_one_request_a_pass_and_its_own_column(trainer: Any) -> None:
    both = trainer._projections("policy")
    assert [part.layers for part in both.parts] == [(1, 3), (2, 3)] and both.layers == (1, 2, 3)
    assert both.column == "activation_scores_policy"
    assert len(trainer._projections("reference").parts) == 1
    assert [detector.config.direction_index for detector in trainer.detectors] == [0, 1, 2, 3]


def test_only_a_pass_that_asks_is_probed(trainer: Any) -> None:
    batch = SimpleNamespace(extra_info={})
    with trainer._probing(batch, "policy"):
        assert len(batch.extra_info["probe"].parts) == 2
    assert batch.extra_info == {}
    trainer.readers = trainer.readers[2:]
    with trainer._probing(batch, "policy"):
        assert batch.extra_info == {}


def test_each_detector_finds_its_own_columns(trainer: Any) -> None:
    trainer.activations = {"policy": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "reference": torch.tensor([[5.0], [6.0]])}
    own, same, frozen = (trainer._activation_scores(detector).tolist() for detector in trainer.detectors[:3])
    assert (own, same, frozen) == ([[1.0], [3.0]], [[2.0], [4.0]], [[5.0], [6.0]])


def test_an_extra_forward_is_charged_to_who_needs_it(trainer: Any) -> None:
    trainer._own_scoring_pass(None, "ablated")
    trainer._own_scoring_pass(None, "policy")  # the run's own method would make it anyway
    assert list(trainer._seconds) == ["ablated"]
    assert [(extra["ablate_quarantine"], extra["no_lora_adapter"]) for extra in trainer.asked] == [
        (True, False),
        (False, False),
    ]
