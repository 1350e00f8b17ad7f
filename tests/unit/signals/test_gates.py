"""Gates: every rule by hand-computed routes, exact state, refusals."""

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_grad_routing.errors import UserError
from verl_grad_routing.gates import GATES
from verl_grad_routing.routing import Route

K, A, R = int(Route.KEEP), int(Route.ABSORB), int(Route.ROUTE)
PAIR_MEANS = (3.0, 1.0)
PAIR_SCORES = (torch.tensor([2.0, 4.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64))


def build(name, **settings):
    return GATES.build({"name": name, **settings}, "grad_routing.gate")


def decide(gate, scores, step=1, pair_means=PAIR_MEANS, pair_scores=PAIR_SCORES):
    return gate.decide(torch.tensor(scores, dtype=torch.float64), step, pair_means, pair_scores)


def routes(gate, scores, **kwargs):
    decision = decide(gate, scores, **kwargs)
    assert decision.routes_B.dtype == torch.int64
    return decision.routes_B.tolist()


def test_absorb_all():
    assert routes(build("absorb_all"), [5, -5, 0]) == [A, A, A]


def test_batch_quantile_by_hand():
    assert routes(build("batch_quantile", route=0.5, keep=0.25), [4, 1, 3, 2]) == [R, K, R, A]
    assert routes(build("batch_quantile", route=0.75, keep=0.25), [4, 1, 3, 2]) == [R, K, R, R]
    assert routes(build("batch_quantile", route=0.0, keep=0.5), [4, 1, 3, 2]) == [A, K, A, K]
    assert routes(build("batch_quantile", route=1.0, keep=0.0), [4, 1, 3, 2]) == [R, R, R, R]
    assert routes(build("batch_quantile", route=0.0, keep=0.0), [4, 1, 3, 2]) == [A, A, A, A]
    # five scores, .5: floor(2.5) = 2 routed; .25: floor(1.25) = 1 kept
    assert routes(build("batch_quantile", route=0.5, keep=0.25), [1, 2, 3, 4, 5]) == [K, A, A, R, R]
    # 0.29 * 100 is 28.999999999999996 in floating point
    assert routes(build("batch_quantile", route=0.29, keep=0.0), list(range(100))).count(R) == 29


def test_ties_that_straddle_a_boundary_are_absorbed():
    gate = build("batch_quantile", route=0.75, keep=0.25)
    assert routes(gate, [2, 2, 2, 2]) == [A, A, A, A]
    assert routes(gate, [2]) == [A]
    assert routes(gate, [3, 3, 2, 2]) == [R, R, A, A]  # keep one of two equal: neither
    assert routes(build("batch_quantile", route=0.25, keep=0.5), [3, 3, 2, 2]) == [A, A, K, K]
    assert routes(build("batch_quantile", route=0.25, keep=0.25), [3, 3, 2, 2]) == [A, A, A, A]


def test_thresholds_reported_are_those_that_decide():
    decision = decide(build("batch_quantile", route=0.5, keep=0.25), [4, 1, 3, 2])
    assert decision.metrics["gate/threshold_route"] == 2 and decision.metrics["gate/threshold_keep"] == 2
    assert decision.metrics["gate/history_size"] == 4
    decision = decide(build("batch_quantile", route=1.0, keep=0.0), [4, 1, 3, 2])
    assert math.isnan(decision.metrics["gate/threshold_route"])


def test_history_quantile_by_hand():
    gate = build("history_quantile", route=0.5, keep=0.25)
    assert routes(gate, [1, 2, 3, 4]) == [K, A, R, R]
    # history 1 2 3 4 | 3.5 4.5 5 6: four of eight are routed, 4 and above; two kept, 1 and 2
    assert routes(gate, [6, 5, 3.5, 4.5]) == [R, R, A, R]
    # ... | 7 8 9 10: six of twelve routed, 5 and above: the whole batch; the policy has drifted
    decision = decide(gate, [7, 8, 9, 10])
    assert decision.routes_B.tolist() == [R, R, R, R] and decision.metrics["gate/history_size"] == 12
    # ... | 0 0.5 0.7 11: four of sixteen kept, below 2: 0, 0.5, 0.7, 1
    assert routes(gate, [0, 0.5, 0.7, 11]) == [K, K, K, R]


def test_history_window():
    gate = build("history_quantile", route=0.5, keep=0.25, window=6)
    routes(gate, [100, 100, 1, 2])
    decision = decide(gate, [3, 4, 5, 6])  # the last six: 1 2 3 4 5 6; three routed, one kept (1)
    assert decision.routes_B.tolist() == [A, R, R, R] and decision.metrics["gate/history_size"] == 6
    decision = decide(gate, list(range(8)))  # a batch larger than the window counts whole
    assert decision.routes_B.tolist() == [K, K, A, A, R, R, R, R]
    assert len(gate.state_dict()["history"]) == 8


def test_threshold_is_strict():
    gate = build("threshold", route_above=0.5, keep_below=-0.5)
    assert routes(gate, [1, 0.5, 0, -0.5, -1]) == [R, A, A, A, K]
    assert routes(build("threshold", route_above=0), [1, 0, -1]) == [R, A, A]
    assert routes(build("threshold", keep_below=0), [1, 0, -1]) == [A, A, K]
    assert routes(build("threshold", route_above=0, keep_below=0), [1, 0, -1]) == [R, A, K]
    assert routes(build("threshold"), [1, 0, -1]) == [A, A, A]


def test_pair_midpoint_by_hand():
    gate = build("pair_midpoint")  # unwanted 3, wanted 1: route above 2, keep below 1
    assert routes(gate, [2.1, 2, 1.5, 1, 0.9]) == [R, A, A, A, K]
    assert routes(build("pair_midpoint", route_at=1.0, keep_at=0.5), [3.1, 3, 2, 1.9]) == [R, A, A, K]
    assert routes(build("pair_midpoint", route_at=-0.5, keep_at=None), [0.1, -0.1]) == [R, A]
    assert gate.needs_pair_means and not build("threshold").needs_pair_means
    with pytest.raises(UserError, match="contrastive pairs"):
        decide(gate, [1.0], pair_means=None)
    with pytest.raises(UserError, match="unwanted sides must score higher"):
        decide(gate, [1.0], pair_means=(1.0, 1.0))


def test_cap_routes_the_highest_and_breaks_ties_by_row():
    gate = build("threshold", route_above=0, max_route_share=0.5)
    decision = decide(gate, [1, 4, 3, 2])
    assert decision.routes_B.tolist() == [A, R, R, A] and decision.metrics["gate/capped"] == 0.5
    assert routes(gate, [1, 1, 1, 2]) == [R, A, A, R]
    assert decide(gate, [-1, -1, 3, 2]).metrics["gate/capped"] == 0
    assert routes(build("threshold", route_above=0, max_route_share=0), [1, 2]) == [A, A]
    assert routes(build("threshold", route_above=0, max_route_share=0.3), [1, 2, 3]) == [A, A, A]  # floor(0.9)


def test_warm_up_absorbs_but_fills_the_history():
    gate = build("history_quantile", route=0.5, keep=0.25, warmup_steps=2)
    for step in (1, 2):
        decision = decide(gate, [1, 2, 3, 4], step=step)
        assert decision.routes_B.tolist() == [A] * 4 and decision.metrics["gate/warmup"] == 1
    decision = decide(gate, [1.5, 2.5, 3.5, 4.5], step=3)  # twelve scores: 1 1 1.5 | ... six highest: 3 and above
    assert decision.routes_B.tolist() == [K, A, R, R] and decision.metrics["gate/history_size"] == 12


def test_abstain_when_the_scores_hardly_differ():
    gate = build("threshold", route_above=0, abstain_std=1.0)
    decision = decide(gate, [1, 1.5, 2])  # standard deviation .41
    assert decision.routes_B.tolist() == [A, A, A] and decision.metrics["gate/abstained"] == 1
    decision = decide(gate, [1, -1, 1, -1])  # exactly 1
    assert decision.routes_B.tolist() == [R, A, R, A] and decision.metrics["gate/abstained"] == 0
    assert routes(build("threshold", route_above=0), [1, 1]) == [R, R]  # 0: never


@pytest.mark.parametrize("name", GATES)
def test_drift_in_standard_deviations_of_the_run(name):
    gate = build(name)
    assert math.isnan(decide(gate, [1, 3]).metrics["gate/drift"])
    assert decide(gate, [4, 4]).metrics["gate/drift"] == pytest.approx(2)  # 4 from mean 2, deviation 1
    # 1 3 4 4: mean 3, deviation sqrt(1.5)
    assert decide(gate, [0]).metrics["gate/drift"] == pytest.approx(-3 / math.sqrt(1.5))


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("settings", [{}, {"warmup_steps": 2}, {"window": 30}])
def test_a_restored_gate_continues_bit_for_bit(name, settings):
    if not set(settings) <= {field.name for field in dataclasses.fields(GATES[name].Config)}:
        settings = {}
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, generator=generator, dtype=torch.float64) + step / 3 for step in range(8)]
    whole, first = build(name, **settings), build(name, **settings)
    expected = [whole.decide(batch, step, PAIR_MEANS, PAIR_SCORES) for step, batch in enumerate(batches, start=1)]
    for step, batch in enumerate(batches[:3], start=1):
        first.decide(batch, step, PAIR_MEANS, PAIR_SCORES)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    first.decide(batches[0] + 100, 4, PAIR_MEANS, PAIR_SCORES)  # the saved state must not follow
    resumed = build(name, **settings)
    resumed.load_state_dict(state)
    for step, batch in enumerate(batches[3:], start=4):
        decision = resumed.decide(batch, step, PAIR_MEANS, PAIR_SCORES)
        assert torch.equal(decision.routes_B, expected[step - 1].routes_B)
        assert decision.metrics == pytest.approx(expected[step - 1].metrics, abs=0, rel=0, nan_ok=True)
    other = build("threshold" if name != "threshold" else "absorb_all")
    with pytest.raises(UserError, match=name):
        other.load_state_dict(state)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(-6, 6), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(0, 10),
    st.integers(0, 10),
    st.sampled_from(["batch_quantile", "history_quantile"]),
    st.randoms(use_true_random=False),
)
def test_shares_mean_what_the_docstring_says(batches, tenths_route, tenths_keep, name, random):
    tenths_keep = min(tenths_keep, 10 - tenths_route)
    gate = build(name, route=tenths_route / 10, keep=tenths_keep / 10)
    population = []
    for step, batch in enumerate(batches, start=1):
        state = gate.state_dict()
        population = (population if name == "history_quantile" else []) + batch
        got = routes(gate, [float(score) for score in batch], step=step)
        for score, route in zip(batch, got, strict=True):
            as_high = sum(other >= score for other in population)
            as_low = sum(other <= score for other in population)
            routed = 10 * as_high <= tenths_route * len(population)
            kept = 10 * as_low <= tenths_keep * len(population)
            assert not (routed and kept)
            assert route == (R if routed else K if kept else A)
        # the order of rows does not matter
        order = random.sample(range(len(batch)), len(batch))
        again = build(name, route=tenths_route / 10, keep=tenths_keep / 10)
        again.load_state_dict(state)
        assert routes(again, [float(batch[i]) for i in order], step=step) == [got[i] for i in order]


BAD_CONFIGS = [
    ("batch_quantile", {"route": 0.75, "keep": 0.5}, "at most 0.25"),
    ("batch_quantile", {"route": 75}, "from 0 to 1"),
    ("batch_quantile", {"keep": "low"}, "from 0 to 1"),
    ("history_quantile", {"window": -1}, "at least 0"),
    ("history_quantile", {"window": 1.5}, "integer"),
    ("history_quantile", {"windows": 1}, "did you mean 'window'"),
    ("threshold", {"route_above": 0, "keep_below": 1}, "at most route_above"),
    ("threshold", {"route_above": math.nan}, "finite"),
    ("pair_midpoint", {"route_at": 0.2, "keep_at": 0.3}, "at most route_at"),
    ("threshold", {"max_route_share": 1.5}, "from 0 to 1"),
    ("threshold", {"max_route_share": True}, "from 0 to 1"),
    ("threshold", {"warmup_steps": -1}, "at least 0"),
    ("threshold", {"abstain_std": -0.1}, "at least 0"),
    ("absorb_all", {"route": 0.5}, "route"),
    ("quantile", {}, "batch_quantile"),
]


@pytest.mark.parametrize(("name", "settings", "hint"), BAD_CONFIGS)
def test_bad_configuration_is_one_line(name, settings, hint):
    with pytest.raises(UserError) as caught:
        build(name, **settings)
    message = str(caught.value)
    assert message.startswith("grad_routing.gate.") and hint in message and "\n" not in message


@pytest.mark.parametrize("name", GATES)
def test_bad_scores_are_refused_and_leave_no_trace(name):
    gate = build(name)
    state = str(gate.state_dict())
    for bad in (
        torch.tensor([1.0, math.nan], dtype=torch.float64),
        torch.tensor([1.0, -math.inf], dtype=torch.float64),
        torch.zeros(0, dtype=torch.float64),
        torch.zeros(2, 1, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float32),
    ):
        with pytest.raises(UserError, match="scores"):
            gate.decide(bad, 1, PAIR_MEANS, PAIR_SCORES)
    assert str(gate.state_dict()) == state
