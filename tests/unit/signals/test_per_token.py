"""Routes of tokens before they reach an engine: the gate, scores of tokens, what the driver makes of both."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path

import pytest
import torch

from verl_grad_routing.config import build_methods, parse
from verl_grad_routing.detectors import DETECTORS, BatchView, checked_token_scores, view_for
from verl_grad_routing.detectors.tokens import trailing_mean
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates import GATES
from verl_grad_routing.interventions import INTERVENTIONS, Judged
from verl_grad_routing.routing import Route
from verl_grad_routing.training.router import Router
from verl_grad_routing.training.token_routes import column, trusted_tokens

K, A, R = int(Route.KEEP), int(Route.ABSORB), int(Route.ROUTE)


def rows(*scores):
    return [torch.tensor(row, dtype=torch.float64) for row in scores]


def build(elsewhere="most_tokens", **inner):
    return GATES.build({"name": "per_token", "elsewhere": elsewhere, "inner": inner}, "grad_routing.gate")


def decide(gate, *scores, step=1):
    decision = gate.decide_tokens(rows(*scores), step, (3.0, 1.0))
    return [row.tolist() for row in decision.token_routes], decision.routes_B.tolist(), decision.metrics


class TestGate:
    def test_shares_are_of_the_batchs_tokens_by_hand(self):
        """Eight tokens of three rollouts; half of them are routed, the four highest; a quarter kept, the two lowest."""
        gate = build(name="batch_quantile", route=0.5, keep=0.25)
        tokens, rollouts, metrics = decide(gate, [8, 1, 7], [2, 3], [6, 5, 4])
        assert tokens == [[R, K, R], [K, A], [R, R, A]]
        assert rollouts == [R, A, R]  # two of three, a tie, two of three
        assert metrics["gate/history_size"] == 8 and metrics["gate/threshold_route"] == 4

    def test_the_cap_is_a_share_of_tokens(self):
        gate = build(name="threshold", route_above=0, max_route_share=0.4)  # floor(.4 x 5) = 2
        tokens, _, metrics = decide(gate, [1, 5], [4, 3, -1])
        assert tokens == [[A, R], [R, A, A]] and metrics["gate/capped"] == 0.4

    def test_positions_elsewhere_by_hand(self):
        thresholds = {"name": "threshold", "route_above": 0.5, "keep_below": -0.5}
        batch = ([1, 1, 0], [1, 0], [-1, -1, -1], [-1, -1, 1], [0, -1, 1], [])
        assert decide(build(**thresholds), *batch)[1] == [R, A, K, K, A, A]
        assert decide(build("any_token", **thresholds), *batch)[1] == [R, R, K, R, R, A]

    def test_warm_up_ramp_and_abstention_are_the_inner_gates(self):
        gate = build(name="threshold", route_above=0, warmup_steps=1, ramp_steps=2, abstain_std=1e-3)
        assert decide(gate, [1, 2], [3])[0] == [[A, A], [A]]
        assert decide(gate, [1, 2], [3, 4], step=2)[0] == [[A, A], [R, R]]  # half of the four
        tokens, _, metrics = decide(gate, [1, 1], [1], step=9)
        assert tokens == [[A, A], [A]] and metrics["gate/abstained"] == 1

    def test_hysteresis_and_pairs_work_inside(self):
        gate = build(name="hysteresis", inner={"name": "threshold", "route_above": 5}, on=0.9, off=0.1)
        assert decide(gate, [0, 0], [9, 9])[0] == [[A, A], [R, R]]
        assert build(name="pair_midpoint").needs_pair_means
        assert decide(build(name="pair_midpoint"), [2.1, 2], [0.9])[0] == [[R, A], [K]]

    def test_a_restored_gate_decides_as_the_saved_one_would_have(self):
        generator = torch.Generator().manual_seed(0)
        batches = [[torch.randn(n, generator=generator).double() for n in (3, 1, 5)] for _ in range(4)]
        settings = {"name": "exponential_quantile", "route": 0.4, "keep": 0.2, "half_life": 5}
        whole, first = build(**settings), build(**settings)
        for step, batch in enumerate(batches[:2], 1):
            whole.decide_tokens(batch, step), first.decide_tokens(batch, step)
        resumed = build(**settings)
        resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        for step, batch in enumerate(batches[2:], 3):
            one, two = whole.decide_tokens(batch, step), resumed.decide_tokens(batch, step)
            assert all(map(torch.equal, one.token_routes, two.token_routes)) and one.metrics == two.metrics

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"inner": {"name": "per_token"}}, "decides on tokens already"),
            ({"inner": {"name": "batch_quantile", "route": 2}}, "grad_routing.gate.inner.route=2"),
            ({"inner": 3}, "give a gate"),
            ({"elsewhere": "prompt"}, "any_token"),
        ],
    )
    def test_bad_settings_are_one_line(self, settings, told):
        with pytest.raises(UserError) as caught:
            GATES.build({"name": "per_token", **settings}, "grad_routing.gate")
        assert told in str(caught.value) and "\n" not in str(caught.value)

    def test_a_batch_without_tokens_is_refused(self):
        with pytest.raises(UserError, match="scores"):
            decide(build(name="threshold"), [], [])


class TestScores:
    def test_a_causal_mean_by_hand(self):
        scores = torch.tensor([1.0, 3.0, 5.0, 1.0], dtype=torch.float64)
        assert trailing_mean(scores, 2).tolist() == [1, 2, 4, 3]
        assert trailing_mean(scores, 3).tolist() == [1, 2, 3, 3]
        assert trailing_mean(scores, 9).tolist() == [1, 2, 3, 2.5]
        assert trailing_mean(scores, 1) is scores and len(trailing_mean(scores[:0], 3)) == 0

    def test_only_tokens_that_count_are_scored_and_smoothed_over(self):
        view = token_view(scores=[[1.0, 100.0, 3.0], [4.0]], masks=[[1, 0, 1], [1]])
        made = DETECTORS.build({"name": "persona_act", "pairs": "p.jsonl", "token_window": 2}, "d")
        assert [row.tolist() for row in checked_token_scores(made, view)] == [[1, 2], [4]]

    def test_who_scores_tokens_and_who_may_see_them(self):
        assert {name for name, kind in DETECTORS.items() if kind.scores_tokens} == {
            "persona_act",
            "persona_permuted",
            "random",
        }
        view = token_view(scores=[[1.0]], masks=[[1]])
        for name, settings in {"concept_act": {"pairs": "p.jsonl"}, "coinflip": {}}.items():
            other = DETECTORS.build({"name": name, **settings}, "d")
            assert view_for(other, view).activation_token_scores is None
            with pytest.raises(UserError, match="it scores rollouts, not tokens"):
                other.token_scores(view)

    def test_scores_that_cannot_be_routed_on_are_refused(self):
        made = DETECTORS.build({"name": "random"}, "d")
        with pytest.raises(UserError, match="token score of rollout 0_0_0"):
            checked_token_scores(made, token_view(scores=[[1.0, math.inf]], masks=[[1, 1]]))
        with pytest.raises(UserError, match="same lengths"):
            checked_token_scores(made, token_view(scores=[[1.0]], masks=[[1, 1]]))
        blind = dataclasses.replace(token_view(scores=[[1.0]], masks=[[1]]), activation_token_scores=None)
        with pytest.raises(UserError, match="the worker must project every response token"):
            checked_token_scores(made, blind)

    @pytest.mark.parametrize("settings", [{"token_window": 0}, {"token_score": "dot"}])
    def test_bad_settings_are_one_line(self, settings):
        with pytest.raises(UserError, match=next(iter(settings))):
            DETECTORS.build({"name": "random", **settings}, "d")


def token_view(scores, masks):
    tensors = [tuple(torch.tensor(row) for row in some) for some in (scores, masks)]
    return BatchView(
        keys=tuple(f"{row}_0_0" for row in range(len(scores))),
        uids=("a",) * len(scores),
        step=1,
        seed=0,
        activation_scores_BD=torch.tensor([[sum(row) / len(row)] for row in scores]),
        activation_token_scores=tensors[0],
        response_masks=tensors[1],
        proxy_reward_B=torch.zeros(len(scores)),
    )


class TestRouter:
    def router(self, **gate):
        settings = {"detector": {"name": "random"}, "intervention": {"name": "route"}}
        inner = {"name": "threshold", "route_above": 0.5, "keep_below": -0.5}
        config = parse({**settings, "gate": {"name": "per_token", "inner": inner, **gate}})
        made = Router(config, build_methods(config))
        made.detector.fit(None, None, (1,), 8)
        return made

    def test_decision_shares_and_verdicts_by_hand(self):
        view = token_view([[1.0, 9.0, 1.0, 0.0], [-1.0, 0.0], [0.0]], [[1, 0, 1, 1], [1, 1], [1]])
        judged, metrics = self.router().decide(view)
        # the second token of the first rollout does not count: it has the route of the rollout's other positions
        assert [row.tolist() for row in judged.token_routes] == [[R, R, R, A], [K, A], [A]]
        assert judged.routes_B.tolist() == [R, A, A]
        counted = {"route": 2, "keep": 1, "absorb": 3}
        assert all(metrics[f"routing/share_{name}"] == pytest.approx(n / 6) for name, n in counted.items())
        assert metrics["detector/share_flagged"] == pytest.approx(1 / 3)
        assert metrics["routing/share_mixed"] == pytest.approx(2 / 3)
        assert metrics["detector/token_score_mean"] == pytest.approx(1 / 6)

    def test_trusted_rollouts_are_kept_in_every_token(self):
        view = token_view([[1.0, 1.0], [1.0, 0.0]], [[1, 1], [1, 1]])
        judged, metrics = self.router().decide(view, torch.tensor([True, False]))
        assert [row.tolist() for row in judged.token_routes] == [[K, K], [R, A]]
        assert judged.routes_B.tolist() == [K, A] and metrics["routing/share_keep"] == 0.5

    def test_a_restored_router_goes_on_alike(self, tmp_path: Path):
        inner = {"name": "history_quantile", "route": 0.5, "keep": 0.2}
        views = [token_view([[s, s + 1.0], [2.0 - s]], [[1, 1], [1]]) for s in (0.0, 3.0, -2.0)]
        whole, first, resumed = (self.router(inner=inner) for _ in range(3))
        for view in views[:2]:
            whole.decide(view), first.decide(view)
        first.save(str(tmp_path), {})
        resumed.load(str(tmp_path))
        one, two = whole.decide(views[2])[0], resumed.decide(views[2])[0]
        assert all(map(torch.equal, one.token_routes, two.token_routes)) and torch.equal(one.routes_B, two.routes_B)

    def test_rows_without_a_rollout_are_absorbed(self):
        made = column((torch.tensor([R, K]), torch.tensor([R])), [2, 0], [1, 3, 2])
        assert [row.tolist() for row in made] == [[R], [A, A, A], [R, K]]
        assert trusted_tokens((torch.tensor([R]),), torch.tensor([False]))[0].tolist() == [R]


def test_kept_tokens_alone_are_clamped():
    advantages = torch.tensor([[-1.0, -1.0, 2.0], [-1.0, -1.0, 0.0]])
    tokens = (torch.tensor([K, R, K]), torch.tensor([A, K]))
    judged = Judged(torch.zeros(2), torch.tensor([K, K]), ("a", "a"), token_routes=tokens)
    route = INTERVENTIONS.build({"name": "route"}, "i")
    assert route.advantages(advantages, judged).tolist() == [[0, -1, 2], [-1, 0, 0]]
    whole = dataclasses.replace(judged, token_routes=None)
    assert route.advantages(advantages, whole).tolist() == [[0, 0, 2], [0, 0, 0]]
    free = INTERVENTIONS.build({"name": "route", "clamp_keep_advantages": False}, "i")
    assert free.advantages(advantages, judged) is advantages


def test_who_takes_routes_of_tokens():
    taking = {name for name, kind in INTERVENTIONS.items() if kind.takes_token_routes}
    assert taking == {"route", "sgtm", "cloud"} and all(INTERVENTIONS[name].uses_routes for name in taking)
