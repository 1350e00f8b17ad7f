"""The monitor that only watches: its numbers by hand, and that nothing else comes of it."""

import dataclasses
import math

import pytest
import torch

from verl_grad_routing.config import build_methods, parse
from verl_grad_routing.detectors import checked_scores
from verl_grad_routing.detectors.held_out import held_out_metrics, verdict_rates
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.router import Router

WATCHED = {"held_out_monitor": {"name": "monitor", "rules": ["^bad"]}}
TRAINED = {
    "detector": {"name": "monitor", "rules": ["^[02468]"]},
    "gate": {"name": "threshold", "route_above": 0.5},
    "intervention": {"name": "penalize"},
}


def sure(prompts, responses):
    return [1.0 for _ in responses]


def router(**settings):
    config = parse({**TRAINED, **settings})
    return Router(config, build_methods(config))


def test_numbers_by_hand(make_detector, make_view):
    responses = ("bad", "good", "bad", "good", "bad")
    hack = torch.tensor([1.0, 1, 1, 0, 0])
    view = dataclasses.replace(make_view(rows=5), responses=responses, facts={"hack": hack})
    found = held_out_metrics(make_detector("monitor", rules=["^bad"]), view)
    assert found == {
        "monitor/heldout/rate": 0.6,
        "monitor/heldout/recall": pytest.approx(2 / 3),
        "monitor/heldout/false_positive_rate": 0.5,
        "monitor/heldout/auroc": pytest.approx(3.5 / 6),  # six pairs: 1, .5, .5, 0, 1, .5
    }
    without = held_out_metrics(make_detector("monitor", rules=["^bad"]), dataclasses.replace(view, facts=None))
    assert without == {"monitor/heldout/rate": 0.6}


@pytest.mark.parametrize(("low", "high", "flagged"), [(0, 1, 6), (-1, 1, 12), (0, 2, 0)])
def test_a_classifiers_verdict_starts_at_the_midpoint_of_its_range(make_detector, make_view, low, high, flagged):
    """Scores 0.9 and 0.2, half of the rows each."""
    found = held_out_metrics(make_detector("classifier", low=low, high=high), make_view())
    assert found["monitor/heldout/rate"] == flagged / 12


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("monitor", {"rules": ["."], "recall": 0.5}),
        ("classifier", {"function": f"{__name__}:sure", "flip_rate": 0.5}),
    ],
)
def test_its_dials_err_elsewhere_than_those_of_the_trainings_monitor(make_detector, make_view, name, settings):
    """Two fair coins agree on half of 2,000 rollouts (deviation 1.1%), and fall the same in every arm."""
    detector, rows = make_detector(name, **settings), 2_000
    view = dataclasses.replace(make_view(rows=rows), facts=None)
    view = dataclasses.replace(view, facts={"hack": checked_scores(detector, view)})
    found = held_out_metrics(detector, view)
    assert found["monitor/heldout/rate"] == pytest.approx(0.5, abs=0.05)
    assert found["monitor/heldout/recall"] == pytest.approx(0.5, abs=0.06)  # 1 where they err together
    assert found["monitor/heldout/false_positive_rate"] == pytest.approx(0.5, abs=0.06)  # then 0
    assert found == held_out_metrics(detector, view)


def test_rates_without_a_kind_are_not_numbers():
    flags = torch.tensor([True, False])
    assert math.isnan(verdict_rates(flags, torch.ones(2))["false_positive_rate"])
    assert math.isnan(verdict_rates(flags, torch.zeros(2))["recall"])


def test_it_changes_no_verdict_no_reward_and_no_other_metric(make_view):
    view = dataclasses.replace(make_view(), responses=tuple(f"{row}" for row in range(12)))
    (alone, metrics), (beside, watched) = (router(**settings).decide(view) for settings in ({}, WATCHED))
    assert torch.equal(alone.routes_B, beside.routes_B) and torch.equal(alone.scores_B, beside.scores_B)
    assert {key: str(value) for key, value in metrics.items()} == {key: str(value) for key, value in watched.items()}
    assert metrics["detector/recall"] == pytest.approx(0.5)  # hacks are rows 0, 3, 6, 9
    assert router().watch(view) == {} and router(**WATCHED).watch(view)["monitor/heldout/rate"] == 0
    assert router(**WATCHED).reads == {"prompts", "responses"}


def test_the_trainings_own_monitor_is_no_held_out_one():
    with pytest.raises(UserError, match=r"grad_routing.held_out_monitor=.*give another monitor"):
        router(held_out_monitor=dict(TRAINED["detector"]))
    with pytest.raises(UserError, match=r"grad_routing.held_out_monitor.name='random': .*reads texts"):
        router(held_out_monitor={"name": "random"})
    with pytest.raises(UserError, match=r"grad_routing.held_out_monitor.name='coinflip': .*reads texts"):
        router(held_out_monitor={"name": "coinflip"})
