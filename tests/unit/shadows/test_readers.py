"""Several detectors, one pass: who reads what, where each finds its columns, and who pays for a pass of its own."""

from __future__ import annotations

import dataclasses
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
        made.readers.append(
            Reader(detectors[name], detectors[name].resolve_layers(LAYERS), HIDDEN, which, None, None, "")
        )
    made.detector, made.routed, made._seconds = detectors["own"], True, defaultdict(float)
    made.shadows = [Shadow(n, {}, Methods(d, None, None)) for n, d in detectors.items() if n != "own"]
    made.asked = []
    made._log_prob_pass = lambda batch, extra: made.asked.append(extra)
    return made


def test_one_request_a_pass_and_its_own_column(trainer: Any) -> None:
    both = trainer._projections("policy")
    assert [part.layers for part in both.parts] == [(1, 3), (2, 3)]
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
    found = [trainer._activation_scores(None, reader) for reader in trainer.readers[:3]]
    assert [scores.tolist() for scores, _ in found] == [[[1.0], [3.0]], [[2.0], [4.0]], [[5.0], [6.0]]]
    assert all(features is None for _, features in found)  # no gate asks for them


def test_features_are_found_by_the_place_of_their_projection(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_grad_routing.training.trainer import scoring

    trainer.activations = {"policy": torch.zeros(2, 2)}
    trainer.readers[1] = dataclasses.replace(trainer.readers[1], features=True)
    assert [part.features for part in trainer._projections("policy").parts] == [False, True]
    rows = torch.arange(2.0 * 2 * HIDDEN).view(2, -1)

    def read(_: Any, column: str) -> Any:
        assert column == "activation_scores_policy_features_1"
        return {column: torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)}

    monkeypatch.setattr(scoring, "read", read)
    _, features_BLd = trainer._activation_scores(None, trainer.readers[1])
    assert torch.equal(features_BLd, rows.view(2, 2, HIDDEN))


def test_an_extra_forward_is_charged_to_who_needs_it(trainer: Any) -> None:
    trainer._own_scoring_pass(None, "ablated")
    trainer._own_scoring_pass(None, "policy")  # the run's own method would make it anyway
    assert list(trainer._seconds) == ["ablated"]
    assert [(extra["ablate_quarantine"], extra["no_lora_adapter"]) for extra in trainer.asked] == [
        (True, False),
        (False, False),
    ]
