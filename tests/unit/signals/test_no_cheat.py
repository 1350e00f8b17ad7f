"""The grader's facts, and a rollout's neighbours, cannot reach the routes of a method that claims not to use them."""

import dataclasses

import pytest
import torch

from verl_grad_routing.detectors import DETECTORS, BatchView, Signal, checked_scores
from verl_grad_routing.directions import pool_tokens, project
from verl_grad_routing.gates import GATES

UNGUARDED = {"min_between_share": 0, "min_bimodality": 0}  # the views' scores have one mode
GATE_SETTINGS = {
    "threshold": {"route_above": 0.25, "keep_below": -0.25},
    "pair_midpoint": {"route_at": 0.6},
    "pair_band": {"unwanted_quantile": 0.0, "wanted_quantile": 0.0},
    "exponential_quantile": {"route": 0.4, "keep": 0.25},
    "otsu": UNGUARDED,
    "hysteresis": {"inner": {"name": "otsu", **UNGUARDED}, "on": 0.1, "off": 0.0},
}
LABEL_FREE = [name for name, cls in DETECTORS.items() if cls.signal not in (Signal.labels, Signal.oracle)]


def all_routes(detector, gate_name, views):
    gate = GATES.build({"name": gate_name, **GATE_SETTINGS.get(gate_name, {})}, "grad_routing.gate")
    means = detector.pair_means or (1.0, -1.0)
    scores = detector.pair_scores or (torch.tensor([0.5, 1.0]), torch.tensor([-1.0, 0.5]))
    return [gate.decide(checked_scores(detector, view), view.step, means, scores).routes_B for view in views]


def permuted_facts(view, seed):
    order = torch.randperm(len(view.keys), generator=torch.Generator().manual_seed(seed))
    assert view.facts is not None
    facts = {name: column[order] for name, column in view.facts.items()}
    return dataclasses.replace(view, facts=facts, types=tuple(view.types[row] for row in order.tolist()))


@pytest.mark.parametrize("gate_name", GATES)
@pytest.mark.parametrize("name", DETECTORS)
def test_permuting_all_facts(name, gate_name, make_detector, make_view):
    detector = make_detector(name)
    views = [make_view(detector, seed=step, step=step) for step in (1, 2, 3)]
    permuted = [permuted_facts(view, seed=view.step) for view in views]
    before, after = all_routes(detector, gate_name, views), all_routes(detector, gate_name, permuted)
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    if name in LABEL_FREE or gate_name == "absorb_all" or "facts" not in detector.reads:
        assert same
    else:
        assert not same
    if (
        name in ("persona_act", "grift") and gate_name != "absorb_all"
    ):  # the test would notice: routes are not all the same
        assert len(torch.cat(before).unique()) > 1


def subset(view: BatchView, rows: list[int]) -> BatchView:
    def take(column):
        if column is None:
            return None
        if isinstance(column, dict):
            return {name: take(inner) for name, inner in column.items()}
        return column[rows] if isinstance(column, torch.Tensor) else tuple(column[row] for row in rows)

    names = [field.name for field in dataclasses.fields(view) if field.name not in ("step", "seed")]
    return dataclasses.replace(view, **{name: take(getattr(view, name)) for name in names})


@pytest.mark.parametrize("name", DETECTORS)
def test_a_score_does_not_depend_on_neighbours_or_order(name, make_detector, make_view):
    detector = make_detector(name)
    view = make_view(detector)
    scores = checked_scores(detector, view)
    order = list(range(12))[::-1]
    for rows in [order] if detector.judges_whole_batch else ([3], [11, 0, 5], order):
        assert torch.equal(checked_scores(detector, subset(view, rows)), scores[rows])


def test_from_hidden_states_to_scores_rollouts_are_independent(make_detector):
    detector = make_detector("persona_act")
    generator = torch.Generator().manual_seed(3)
    lengths = [5, 1, 0, 9, 30]
    rollouts = [torch.randn(length, 2, 16, generator=generator) for length in lengths]

    def scores(chosen):
        hidden = torch.cat([rollouts[i] for i in chosen])
        counts = torch.tensor([lengths[i] for i in chosen])
        segment = torch.repeat_interleave(torch.arange(len(chosen)), counts)
        layers = [pool_tokens(hidden[:, layer], torch.ones(len(hidden)), segment, len(chosen))[0] for layer in (0, 1)]
        return project(torch.stack(layers, dim=1), detector.directions_DLd)[:, 0]

    together = scores(range(5))
    for row in range(5):
        assert torch.equal(scores([row])[0], together[row])
    assert torch.equal(scores([4, 2, 0]), together[[4, 2, 0]])
