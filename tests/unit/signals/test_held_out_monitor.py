"""The monitor that only watches: its numbers by hand, and that nothing else comes of it."""

import dataclasses
import math

import pytest
import torch

from verl_grad_routing.config import build_methods, parse
from verl_grad_routing.detectors.held_out import held_out_metrics, verdict_rates
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.router import Router

WATCHED = {"held_out_monitor": {"name": "monitor", "rules": ["^bad"]}}
TRAINED = {
    "detector": {"name": "monitor", "rules": ["^[02468]"]},
    "gate": {"name": "threshold", "route_above": 0.5},
    "intervention": {"name": "penalize"},
}


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
