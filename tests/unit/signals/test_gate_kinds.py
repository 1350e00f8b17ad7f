"""Pair band, Otsu, fading history, hysteresis and the ramp: thresholds and routes by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_grad_routing.errors import UserError
from verl_grad_routing.gates import GATES
from verl_grad_routing.gates.separation import between_share, bimodality, otsu_split
from verl_grad_routing.routing import Route

K, A, R = int(Route.KEEP), int(Route.ABSORB), int(Route.ROUTE)
NO_GUARD = {"min_between_share": 0.0, "min_bimodality": 0.0}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def build(name, **settings):
    return GATES.build({"name": name, **settings}, "grad_routing.gate")


def decide(gate, scores, step=1, pairs=None):
    return gate.decide(tensor(scores), step, None, pairs)


def routes(gate, scores, **kwargs):
    return decide(gate, scores, **kwargs).routes_B.tolist()


class TestPairBand:
    # unwanted 4 5 6 7: quantile .75 is the third lowest, 6; wanted 0 1 2 3: 2
    PAIRS = (tensor([7, 4, 6, 5]), tensor([3, 0, 2, 1]))

    def test_by_hand(self):
        decision = decide(build("pair_band"), [6.1, 6, 3, 2, 1.9], pairs=self.PAIRS)
        assert decision.routes_B.tolist() == [R, A, A, A, K]
        metrics = decision.metrics
        assert (metrics["gate/threshold_route"], metrics["gate/threshold_keep"], metrics["gate/abstained"]) == (6, 2, 0)
        # .5: the second lowest, 5 and 1; .51: ceil(2.04), the third; 0: the lowest, 4; 1: the highest, 3
        assert routes(build("pair_band", unwanted_quantile=0.5), [5.1, 5], pairs=self.PAIRS) == [R, A]
        assert routes(build("pair_band", unwanted_quantile=0.51), [6.1, 6], pairs=self.PAIRS) == [R, A]
        tight = build("pair_band", unwanted_quantile=0, wanted_quantile=1)
        assert routes(tight, [4.1, 4, 3, 2.9], pairs=self.PAIRS) == [R, A, A, K]
        assert routes(build("pair_band", keep=False), [6.1, -9], pairs=self.PAIRS) == [R, A]

    def test_overlap_abstains_and_shows_the_thresholds(self):
        for unwanted in ([1, 2], [2, 2], [0, 1]):  # quantile 1: at, at and below the wanted sides' 2
            gate = build("pair_band", unwanted_quantile=1, wanted_quantile=1)
            decision = decide(gate, [9, -9], pairs=(tensor(unwanted), tensor([0, 2])))
            assert decision.routes_B.tolist() == [A, A] and decision.metrics["gate/abstained"] == 1
            assert decision.metrics["gate/threshold_route"] == max(unwanted)
        reversed_pairs = (tensor([0.0]), tensor([1.0]))  # without keeping, the wanted quantile still decides
        assert routes(build("pair_band", keep=False), [9], pairs=reversed_pairs) == [A]

    def test_follows_a_refreshed_direction(self):
        gate = build("pair_band")
        assert routes(gate, [5], pairs=self.PAIRS) == [A]
        assert routes(gate, [5], step=2, pairs=(self.PAIRS[0] - 2, self.PAIRS[1] - 2)) == [R]

    def test_refusals(self):
        gate = build("pair_band")
        assert gate.needs_pair_means
        with pytest.raises(UserError, match="contrastive pairs"):
            gate.decide(tensor([1.0]), 1, (3.0, 1.0))
        for bad in (tensor([math.nan]), tensor([])):
            with pytest.raises(UserError, match=r"pair scores \(wanted\)"):
                decide(gate, [1.0], pairs=(self.PAIRS[0], bad))


class TestOtsu:
    def test_by_hand(self):
        # 0 1 | 10 11: mean 5.5, between (5)^2 = 25, total (5.5^2 + 4.5^2) / 2 = 25.25; moments 25.25, 0, 662.5625
        decision = decide(build("otsu"), [10, 0, 11, 1])
        assert decision.routes_B.tolist() == [R, A, R, A]
        metrics = decision.metrics
        assert metrics["gate/between_share"] == pytest.approx(25 / 25.25, rel=1e-12)
        assert metrics["gate/bimodality"] == pytest.approx(25.25**2 / 662.5625, rel=1e-12)
        assert metrics["gate/threshold_route"] == 1 and metrics["gate/history_size"] == 4
        assert routes(build("otsu", keep=True), [10, 0, 11, 1]) == [R, K, R, K]

    def test_of_equally_good_cuts_the_smallest_upper_class(self):
        # 0 | 1 2 and 0 1 | 2 both have 1/2 of 2/3
        split = otsu_split(np.array([2.0, 0.0, 1.0]))
        assert split == (1.0, 2.0, pytest.approx(0.75))
        assert routes(build("otsu", **NO_GUARD), [0, 1, 2]) == [A, A, R]

    def test_ties_are_never_cut(self):
        assert routes(build("otsu", keep=True), [5, 5, 0, 5]) == [R, R, K, R]
        assert routes(build("otsu", **NO_GUARD, keep=True), [3, 3, 3]) == [A, A, A]
        assert decide(build("otsu", **NO_GUARD), [3]).metrics["gate/abstained"] == 1

    @pytest.mark.parametrize("guard", ["min_between_share", "min_bimodality"])
    def test_each_guard_abstains_just_below_its_value(self, guard):
        scores = [0, 1, 10, 11]
        value = {"min_between_share": 25 / 25.25, "min_bimodality": 25.25**2 / 662.5625}[guard]
        open_guard = NO_GUARD | {guard: value - 1e-9}
        shut_guard = NO_GUARD | {guard: value + 1e-9}
        assert routes(build("otsu", **open_guard), scores) == [A, A, R, R]
        decision = decide(build("otsu", **shut_guard), scores)
        assert decision.routes_B.tolist() == [A] * 4 and decision.metrics["gate/abstained"] == 1
        assert decision.metrics["gate/threshold_route"] == 1

    def test_the_defaults_refuse_one_mode_and_take_two(self):
        draw = torch.Generator().manual_seed(0)
        one = torch.randn(512, generator=draw, dtype=torch.float64)
        assert build("otsu").decide(one, 1).metrics["gate/abstained"] == 1
        two = one + 10 * (torch.arange(512) % 2)
        assert build("otsu").decide(two, 1).routes_B.tolist() == [A, R] * 256

    def test_window(self):
        run = build("otsu", window=0, keep=True)
        routes(run, [0, 1, 0, 1])
        assert routes(run, [10, 11], step=2) == [R, R]  # 0 1 0 1 | 10 11
        assert routes(build("otsu", keep=True), [10, 11]) == [K, R]  # of itself alone: two points

    def test_measures_of_known_distributions(self):
        uniform = np.linspace(0, 1, 100001)
        assert between_share(uniform) == pytest.approx(0.75, abs=1e-4)
        assert bimodality(uniform) == pytest.approx(5 / 9, abs=1e-4)
        normal = np.random.default_rng(0).normal(size=200000)
        assert between_share(normal) == pytest.approx(2 / math.pi, abs=0.01)
        assert bimodality(normal) == pytest.approx(1 / 3, abs=0.01)
        for measure in (between_share, bimodality):
            assert measure(np.full(3, 0.1)) == 0 and measure(np.array([-2.0, 5.0])) == pytest.approx(1)
            assert all(measure(np.array([0.0, 0.0, size])) == pytest.approx(1) for size in (1e-200, 1e200))
        # skewed by hand: 0 0 0 1 has moments 3/16, 3/32, 21/256: (skew^2 + 1) / kurtosis = (4/3 + 1) / (7/3)
        assert bimodality(np.array([0.0, 0, 0, 1])) == pytest.approx(1)
        assert bimodality(np.array([-1.0, 0, 1])) == pytest.approx(2 / 3)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(-20, 20), min_size=1, max_size=20))
    def test_the_cut_is_the_best_of_all(self, values):
        scores = np.array(values, dtype=np.float64)

        def variance(threshold):
            low, high = scores[scores <= threshold], scores[scores > threshold]
            return len(low) * len(high) * (low.mean() - high.mean()) ** 2 / len(scores) ** 2

        split = otsu_split(scores)
        cuts = sorted(set(values))[:-1]
        if not cuts:
            assert split is None
            return
        assert split is not None
        best = max(variance(cut) for cut in cuts)
        assert variance(split.highest_low) == pytest.approx(best, rel=1e-9)
        assert split.between_share == pytest.approx(best / scores.var(), rel=1e-9)
        assert split.lowest_high == min(value for value in values if value > split.highest_low)


class TestExponential:
    def test_by_hand(self):
        gate = build("exponential_quantile", route=0.5, keep=0.25, half_life=2)
        assert routes(gate, [1, 2, 3, 4]) == [K, A, R, R]  # all weigh the same
        # 1 2 3 4 are four rollouts old now and weigh 1/4 each: W = 5. At least 2.6: 2 + 2/4 <= 2.5, 2.2: 3 + 2/4.
        # At most 0: 1 <= 1.25, 2.2: 2 + 2/4.
        decision = decide(gate, [2.6, 0, 5, 2.2], step=2)
        assert decision.routes_B.tolist() == [R, K, R, A]
        assert decision.metrics["gate/history_size"] == 8

    def test_thresholds_are_scores_of_the_population(self):
        gate = build("exponential_quantile", route=0.5, keep=0.25, half_life=2)
        decide(gate, [1, 2, 3, 4])
        # 1 2 3 4 | 9 8 7 0: W = 5; at least 3: 3 + 2/4 > 2.5, 4: 3.25 > 2.5, 7: 3 > 2.5, 8: 2 <= 2.5; at most 1: 1.25
        decision = decide(gate, [9, 8, 7, 0], step=2)
        assert decision.routes_B.tolist() == [R, R, A, K]
        assert decision.metrics["gate/threshold_route"] == 7 and decision.metrics["gate/threshold_keep"] == 2

    def test_old_scores_fade(self):
        fading, lasting = (build("exponential_quantile", route=0.5, keep=0.25, half_life=h) for h in (0.5, 1e9))
        for gate in (fading, lasting):
            decide(gate, [0] * 40)
        assert routes(lasting, [5, 6, 7, 8], step=2) == [R, R, R, R]
        assert routes(fading, [5, 6, 7, 8], step=2) == [A, A, R, R]  # the zeros weigh 40/256

    def test_window(self):
        gate = build("exponential_quantile", route=0.5, keep=0.0, half_life=1e9, window=3)
        decide(gate, [9, 9, 0, 0])
        decision = decide(gate, [1, 2], step=2)  # 0 1 2: one and a half may be routed
        assert decision.routes_B.tolist() == [A, R] and decision.metrics["gate/history_size"] == 3

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.lists(st.integers(-6, 6), min_size=1, max_size=10), min_size=1, max_size=4),
        st.integers(0, 10),
        st.integers(0, 10),
    )
    def test_without_fading_it_is_history_quantile(self, batches, tenths_route, tenths_keep):
        shares = {"route": tenths_route / 10, "keep": min(tenths_keep, 10 - tenths_route) / 10}
        gates = build("exponential_quantile", half_life=1e12, **shares), build("history_quantile", **shares)
        for step, batch in enumerate(batches, start=1):
            fading, plain = (decide(gate, batch, step=step) for gate in gates)
            assert torch.equal(fading.routes_B, plain.routes_B)

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.lists(st.integers(-6, 6), min_size=1, max_size=8), min_size=1, max_size=4),
        st.integers(0, 10),
        st.integers(1, 5),
        st.randoms(use_true_random=False),
    )
    def test_weights_mean_what_the_docstring_says(self, batches, tenths, half_life, random):
        gate = build("exponential_quantile", route=tenths / 10, keep=(10 - tenths) / 10, half_life=half_life)
        sizes = [len(batch) for batch in batches]
        shuffled = [random.sample(batch, len(batch)) for batch in batches[:-1]]
        for step, batch in enumerate([*shuffled, batches[-1]], start=1):
            decision = decide(gate, batch, step=step)
        weighed = [
            (score, 0.5 ** (sum(sizes[number + 1 :]) / half_life))
            for number, batch in enumerate(batches)
            for score in batch
        ]
        total = math.fsum(weight for _, weight in weighed)
        for score, route in zip(batches[-1], decision.routes_B.tolist(), strict=True):
            high = math.fsum(weight for other, weight in weighed if other >= score)
            low = math.fsum(weight for other, weight in weighed if other <= score)
            routed, kept = high <= tenths / 10 * total + 1e-8, low <= (10 - tenths) / 10 * total + 1e-8
            assert route == (R if routed else K if kept else A)


class TestHysteresis:
    TWO, ONE, BETWEEN = [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3]  # shares of variance 1, 0, .8

    def gate(self, **settings):
        inner = settings.pop("inner", {"name": "threshold", "route_above": 0.5})
        return build("hysteresis", inner=inner, **({"on": 0.9, "off": 0.5} | settings))

    def test_turns_on_above_one_level_and_off_below_another(self):
        gate = self.gate()
        batches = [self.BETWEEN, self.TWO, self.BETWEEN, self.ONE, self.BETWEEN, self.TWO]
        decisions = [decide(gate, batch, step=step) for step, batch in enumerate(batches, start=1)]
        assert [d.metrics["gate/on"] for d in decisions] == [0, 1, 1, 0, 0, 1]
        assert [d.metrics["gate/separation"] for d in decisions] == pytest.approx([0.8, 1, 0.8, 0, 0.8, 1])
        assert [d.metrics["gate/abstained"] for d in decisions] == [1, 0, 0, 1, 1, 0]
        assert [d.routes_B.tolist() for d in decisions[:3]] == [[A] * 4, [A, A, R, R], [A, R, R, R]]

    def test_levels_are_strict(self):
        gate = self.gate(on=1.0, off=0.5)
        assert decide(gate, self.TWO).metrics["gate/on"] == 0  # 1 does not exceed 1
        gate = self.gate(on=0.9, off=0.8)
        decide(gate, self.TWO)
        uniform = [-1, 0, 0, 1]  # 0 | 1: (1/4 * 3/4) (4/3)^2 = 1/3 of 1/2
        assert decide(gate, uniform, step=2).metrics["gate/on"] == 0
        gate = self.gate(on=0.9, off=between_share(np.array(uniform, dtype=float)))
        decide(gate, self.TWO)
        assert decide(gate, uniform, step=2).metrics["gate/on"] == 1  # at the level is not below it

    def test_the_inner_gate_sees_every_batch(self):
        gate = self.gate(inner={"name": "history_quantile", "route": 0.5, "keep": 0.25})
        assert decide(gate, [9, 9, 9, 9]).metrics["gate/history_size"] == 4
        decision = decide(gate, self.TWO, step=2)
        assert decision.metrics["gate/history_size"] == 8 and decision.routes_B.tolist() == [K, K, A, A]

    def test_state_is_exact(self):
        inner = {"name": "exponential_quantile", "route": 0.5, "keep": 0.25, "half_life": 3}
        first = self.gate(inner=inner)
        decide(first, self.TWO)
        resumed = self.gate(inner=inner)
        resumed.load_state_dict(first.state_dict())
        for step, batch in enumerate([self.BETWEEN, [5, 1, 7, 7]], start=2):
            one, other = decide(first, batch, step=step), decide(resumed, batch, step=step)
            assert torch.equal(one.routes_B, other.routes_B) and one.metrics == other.metrics
            assert one.metrics["gate/on"] == 1
        with pytest.raises(UserError, match="exponential_quantile"):
            self.gate().load_state_dict(first.state_dict())

    def test_bimodality_as_measure_and_needs_of_the_inner_gate(self):
        decision = decide(self.gate(measure="bimodality"), [-1, 0, 1])
        assert decision.metrics["gate/separation"] == pytest.approx(2 / 3)
        assert self.gate(inner={"name": "pair_band"}).needs_pair_means and not self.gate().needs_pair_means


class TestRamp:
    def test_the_routed_share_grows_linearly_after_the_warm_up(self):
        gate = build("threshold", route_above=0, keep_below=0, warmup_steps=2, ramp_steps=4)
        scores = [1, 2, 3, 4, 5, -1]
        found = [decide(gate, scores, step=step) for step in range(1, 9)]
        # of five above the threshold: floor(5/4), floor(10/4), floor(15/4), all; what is kept is kept at once
        assert [d.routes_B.tolist().count(R) for d in found] == [0, 0, 1, 2, 3, 5, 5, 5]
        assert [d.routes_B.tolist().count(K) for d in found] == [0, 0, 1, 1, 1, 1, 1, 1]
        assert [d.metrics["gate/ramp"] for d in found] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
        assert found[3].routes_B.tolist() == [A, A, A, R, R, K]  # the highest
        assert found[3].metrics["gate/capped"] == 0.5

    def test_the_cap_holds_beside_it(self):
        gate = build("threshold", route_above=0, ramp_steps=2, max_route_share=0.25)
        assert [routes(gate, [1, 2, 3, 4], step=step).count(R) for step in (1, 2)] == [1, 1]
        assert routes(build("threshold", route_above=0), [1, 2]) == [R, R]


BAD = [
    ("pair_band", {"unwanted_quantile": 75}, "unwanted_quantile", "from 0 to 1"),
    ("pair_band", {"keep": "no"}, "keep", "true or false"),
    ("otsu", {"min_between_share": 2}, "min_between_share", "from 0 to 1"),
    ("otsu", {"window": -1}, "window", "at least 0"),
    ("exponential_quantile", {"half_life": 0}, "half_life", "positive"),
    ("exponential_quantile", {"route": 0.9, "keep": 0.2}, "keep", "at most 0.1"),
    ("hysteresis", {"on": 0.2, "off": 0.4}, "off", "at most on"),
    ("hysteresis", {"measure": "spread"}, "measure", "between_share, bimodality"),
    ("hysteresis", {"inner": "otsu"}, "inner", "{name:"),
    ("hysteresis", {"inner": {"name": "otsuu"}}, "inner.name", "did you mean 'otsu'"),
    ("hysteresis", {"inner": {"name": "otsu", "windows": 1}}, "inner.windows", "did you mean 'window'"),
    ("threshold", {"ramp_steps": -1}, "ramp_steps", "at least 0"),
]


@pytest.mark.parametrize(("name", "given_settings", "key", "hint"), BAD)
def test_bad_configuration_is_one_line(name, given_settings, key, hint):
    with pytest.raises(UserError) as caught:
        build(name, **given_settings)
    message = str(caught.value)
    assert message.startswith(f"grad_routing.gate.{key}=") and hint in message and "\n" not in message


@pytest.mark.parametrize("name", GATES)
def test_the_order_of_rows_does_not_matter(name):
    draw = torch.Generator().manual_seed(2)
    batches = [torch.randint(-4, 5, (9,), generator=draw).double() + step for step in range(3)]
    pairs = (tensor([2.0, 3.0]), tensor([0.0, 1.0]))
    whole, shuffled = build(name), build(name)
    for step, batch in itertools.islice(enumerate(batches, start=1), 3):
        order = torch.randperm(9, generator=draw)
        one = whole.decide(batch, step, (2.5, 0.5), pairs)
        other = shuffled.decide(batch[order], step, (2.5, 0.5), pairs)
        assert torch.equal(one.routes_B[order], other.routes_B)
