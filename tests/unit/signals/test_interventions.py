"""Interventions by hand-computed cases: tables, clamps, masks, rewards, who leaves the step."""

import dataclasses
import math

import pytest
import torch

from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions import INTERVENTIONS, Intervention, Judged
from verl_grad_routing.interventions.groups import group_sizes, group_z_scores
from verl_grad_routing.routing import DEFAULT, STRICT, Route

KEEP, ABSORB, ROUTE = Route
ADVANTAGES = torch.tensor([[-1.0, 2.0], [-3.0, 4.0], [-5.0, 6.0]])


def build(name, **settings):
    return INTERVENTIONS.build({"name": name, **settings}, "grad_routing.intervention")


def judged(routes, scores=None, uids=None) -> Judged:
    scores = torch.zeros(len(routes)) if scores is None else torch.tensor(scores)
    uids = ("u",) * len(routes) if uids is None else tuple(uids)
    return Judged(scores.double(), torch.tensor([int(route) for route in routes]), uids)


def group_normalised(rewards):
    """GRPO's advantage of one group: unbiased standard deviation."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    return (rewards - rewards.mean()) / rewards.std()


# ---- route ----


def test_route_clamps_keep_advantages_and_nothing_else():
    before = ADVANTAGES.clone()
    assert build("route").advantages(ADVANTAGES, judged([KEEP, ABSORB, ROUTE])).tolist() == [[0, 2], [-3, 4], [-5, 6]]
    assert torch.equal(ADVANTAGES, before)


def test_route_without_clamp_or_without_keep_is_the_identity():
    verdict = judged([KEEP, ABSORB, ROUTE])
    assert build("route", clamp_keep_advantages=False).advantages(ADVANTAGES, verdict) is ADVANTAGES
    assert build("route").advantages(ADVANTAGES, judged([ROUTE, ABSORB, ROUTE])) is ADVANTAGES


def test_tables():
    route, strict, none = build("route"), build("route", strict=True), build("none")
    assert route.table == none.table == DEFAULT and strict.table == STRICT
    assert STRICT.masks(Route.ABSORB).update_mask == (1, 0)
    assert all(strict.table_at(step) == STRICT for step in (1, 100))
    assert {name for name in INTERVENTIONS if INTERVENTIONS[name].uses_routes} == {"route", "sgtm", "cloud"}


@pytest.mark.parametrize(("unflagged", "update"), [("nothing", (0, 0)), ("quarantine", (0, 1))])
def test_in_the_head_start_unflagged_rollouts_do_not_train_the_deployed_block(unflagged, update):
    route = build("route", head_start_steps=3, head_start_unflagged=unflagged)
    for step in (1, 3):
        table = route.table_at(step)
        assert table.masks(Route.ABSORB).update_mask == update
        assert table.masks(Route.ABSORB).forward_gate == (1, 1)  # sampled and trained under the same forward
        assert (table.keep, table.route) == (DEFAULT.keep, DEFAULT.route)
    assert route.table_at(4) == route.table == DEFAULT
    assert build("route").table_at(1) == DEFAULT


# ---- route: a head start until a rate ----


def seen(route, *measures, key="flagged"):
    """Whether the head start is in force in each step, before and after what that step measures."""
    found = []
    for step, value in enumerate(measures, start=1):
        before = route.table_at(step).absorb.update_mask == (0, 0)
        route.observe(step, {key: value})
        found.append((before, route.table_at(step).absorb.update_mask == (0, 0)))
    return found


@pytest.mark.parametrize("measure", ["flagged", "reward", "swapped_reward"])
def test_a_head_start_ends_after_the_first_step_that_reaches_the_rate(measure):
    route = build("route", head_start_steps=5, head_start_until=0.5, head_start_measure=measure)
    # the routes of step 3 are decided before its rollouts count, and the rate falling again changes nothing
    assert seen(route, 0.1, 0.4, 0.5, 0.1, 0.1, key=measure) == [(True, True)] * 3 + [(False, False)] * 2
    assert route.report(3) == {"intervention/head_start": 1.0} and route.report(4) == {"intervention/head_start": 0.0}


def test_and_after_its_steps_whatever_the_rate_does():
    route = build("route", head_start_steps=2, head_start_until=0.5)
    assert seen(route, 0.1, 0.1, 0.1) == [(True, True)] * 2 + [(False, False)]
    other = build("route", head_start_steps=2, head_start_until=0.5, head_start_measure="reward")
    assert seen(other, 0.9, 0.9) == [(True, True)] * 2  # another measure
    steps = build("route", head_start_steps=2)
    assert seen(steps, 1.0, 1.0, 1.0) == [(True, True)] * 2 + [(False, False)]
    assert build("route").report(1) == {}


def test_a_resumed_head_start_has_ended_where_it_ended():
    route = build("route", head_start_steps=9, head_start_until=0.5)
    seen(route, 0.1, 0.6)
    again = build("route", head_start_steps=9, head_start_until=0.5)
    again.load_state_dict(route.state_dict())
    assert [again.table_at(step).absorb.update_mask for step in (2, 3)] == [(0, 0), (1, 1)]


# ---- route: rollouts sampled with the quarantine off ----


def with_off(routes, off, uids=None) -> Judged:
    return dataclasses.replace(judged(routes, uids=uids), quarantine_off_B=torch.tensor(off))


def test_they_are_trained_as_they_were_sampled_or_as_the_table_says():
    for name in ("route", "none"):
        assert build(name).quarantine_off_table_at(1) == DEFAULT.without_quarantine()
    assert build("route", quarantine_off_gate="routed").quarantine_off_table_at(1) == DEFAULT
    head_start = build("route", head_start_steps=1)
    assert head_start.quarantine_off_table_at(1).absorb.update_mask == (0, 0)
    assert head_start.quarantine_off_table_at(2).absorb.update_mask == (1, 0)


def test_their_negative_advantages_are_on_policy_and_stay():
    verdict = with_off([KEEP, KEEP, ABSORB], [False, True, True])
    assert build("route").advantages(ADVANTAGES, verdict).tolist() == [[0, 2], [-3, 4], [-5, 6]]


def test_what_the_deployed_block_did_by_itself_and_is_flagged_leaves_the_step():
    verdict = with_off([ROUTE, ABSORB, KEEP, ROUTE, ABSORB], [True, True, True, False, False], "uuuvv")
    assert build("route").rejected(verdict).tolist() == [True, False, False, False, False]
    thin = with_off([ROUTE, ROUTE, KEEP, ABSORB, KEEP], [True, True, True, True, False], "uuuvw")
    # one rollout is left of the first group: verl would give it its raw reward; lone groups of others are verl's own
    assert build("route").rejected(thin).tolist() == [True, True, True, False, False]
    assert build("route", quarantine_off_gate="routed").rejected(verdict) is None


def test_a_strict_quarantine_may_have_a_head_start_on_flagged_rollouts_alone():
    strict = build("route", strict=True, head_start_steps=2)
    assert [strict.table_at(step).absorb.update_mask for step in (1, 2, 3)] == [(0, 0), (0, 0), (1, 0)]


@pytest.mark.parametrize("name", sorted(set(INTERVENTIONS) - {"modify_reward", "penalize"}))
def test_rewards_are_untouched(name):
    rewards = torch.tensor([1.0, 0.0, 0.5])
    assert build(name).rewards(rewards, judged([ROUTE] * 3, uids="uuv")) is rewards


@pytest.mark.parametrize("name", sorted(set(INTERVENTIONS) - {"screen"}))
def test_nothing_is_rejected(name):
    assert build(name).rejected(judged([ROUTE, KEEP])) is None


def test_none_overrides_nothing():
    hooks = ("rewards", "advantages", "rejected", "table_at")
    assert all(getattr(INTERVENTIONS["none"], hook) is getattr(Intervention, hook) for hook in hooks)


# ---- screen ----


def test_screen_rejects_the_flagged_and_groups_without_a_baseline():
    verdict = judged([ROUTE, KEEP, ABSORB, ROUTE, ROUTE, ABSORB, ROUTE, ROUTE], uids="aaabbbcc")
    # a keeps two, b one, c none
    assert build("screen").rejected(verdict).tolist() == [True, False, False, True, True, True, True, True]
    assert build("screen", min_kept=1).rejected(verdict).tolist() == [True, False, False, True, True, False, True, True]


def test_screen_without_a_flag_rejects_nothing():
    assert not build("screen").rejected(judged([KEEP, ABSORB], uids="aa")).any()


def test_strict_screening_rejects_only_what_was_paid_for():
    verdict = judged([ROUTE, ROUTE, KEEP, ABSORB], uids="aaaa")
    paid = dataclasses.replace(verdict, rewards_B=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert build("screen").rejected(paid).tolist() == [True, True, False, False]
    assert build("screen", strict=True).rejected(paid).tolist() == [True, False, False, False]
    assert build("screen", strict=True, paid_above=1.0).rejected(paid).tolist() == [False] * 4
    with pytest.raises(UserError, match="strict screening reads proxy rewards"):
        build("screen", strict=True).rejected(verdict)


def test_what_a_penalty_of_3_leaves_to_a_hack_under_a_monitor_of_90_percent():
    """The post's arithmetic (its appendix): .9 * .5 + .1 * 3.5 = .8 > .5, so hacking pays; not so at penalty 4."""
    flagged = judged([ROUTE] * 9 + [ABSORB])
    for penalty, expected in ((3.0, 0.8), (4.0, -0.1)):
        shaped = build("penalize", penalty=penalty).rewards(torch.full((10,), 3.5, dtype=torch.float64), flagged)
        assert float(shaped.mean()) == pytest.approx(expected)


def test_group_statistics_of_a_penalised_group():
    """R = [3.5 (hack), 3.5, .5, .5], penalty 3: A = [-.5, 1.5, -.5, -.5] (LW)."""
    shaped = build("penalize", penalty=3.0).rewards(REWARDS, judged([ROUTE, ABSORB, ABSORB, ABSORB]))
    assert group_normalised(shaped).tolist() == pytest.approx([-0.5, 1.5, -0.5, -0.5])


# ---- mask_advantage: R = [3.5 (hack), 3.5, .5, .5], A = +-.8660 ----


def test_hard_mask_takes_positive_advantages_of_the_flagged():
    advantages = group_normalised([3.5, 3.5, 0.5, 0.5])[:, None].expand(4, 3)
    assert advantages[0, 0] == pytest.approx(0.8660, abs=1e-4)
    shaped = build("mask_advantage").advantages(advantages, judged([ROUTE, ABSORB, ABSORB, ROUTE]))
    assert shaped[:, 0].tolist() == pytest.approx([0, 0.8660, -0.8660, -0.8660], abs=1e-4)


def test_soft_mask_scales_by_the_score_and_asks_no_gate():
    verdict = judged([ABSORB] * 3, scores=[0.25, 1.0, 0.5])
    shaped = build("mask_advantage", soft=True).advantages(torch.tensor([[2.0], [2.0], [-2.0]]), verdict)
    assert shaped.flatten().tolist() == [1.5, 0.0, -2.0]


def test_soft_mask_refuses_scores_that_are_no_shares():
    with pytest.raises(UserError, match=r"grad_routing.intervention.soft=1.5.*scores are in \[0, 1\]"):
        build("mask_advantage", soft=True).advantages(ADVANTAGES, judged([ROUTE] * 3, scores=[0, 1.5, 0]))


# ---- modify_reward: oracle numbers from s = [1,0,0,0], R = [3.5,3.5,.5,.5] ----

REWARDS = torch.tensor([3.5, 3.5, 0.5, 0.5], dtype=torch.float64)
ONE_HIGH = judged([ABSORB] * 4, scores=[1.0, 0, 0, 0])


def test_z_scores():
    assert group_z_scores(ONE_HIGH.scores_B, ONE_HIGH.uids, 0.1).tolist() == [1.5, -0.5, -0.5, -0.5]
    floored = group_z_scores(0.05 * ONE_HIGH.scores_B, ONE_HIGH.uids, 0.1)
    assert floored.tolist() == pytest.approx([0.375, -0.125, -0.125, -0.125])


def test_z_scores_know_their_groups():
    values, uids = torch.tensor([1.0, 5.0, 3.0, 7.0, 9.0]), ("a", "b", "a", "b", "c")
    root = math.sqrt(0.5)
    assert group_z_scores(values, uids, 0.1).tolist() == pytest.approx([-root, -root, root, root, 0])
    assert group_sizes(uids).tolist() == [2, 2, 2, 2, 1]


def test_multiplicative_rewards_and_the_advantages_they_give():
    shaped = build("modify_reward").rewards(REWARDS, ONE_HIGH)
    assert shaped.tolist() == pytest.approx([-2.2230, 3.5, 0.5, 0.5], abs=1e-4)
    assert shaped[0] == pytest.approx(-3.5 * math.tanh(0.75))
    assert group_normalised(shaped).tolist() == pytest.approx([-1.1944, 1.2536, -0.0296, -0.0296], abs=1e-4)


def test_additive_rewards_and_the_advantages_they_give():
    shaped = build("modify_reward", form="additive").rewards(REWARDS, ONE_HIGH)
    assert shaped.tolist() == pytest.approx([0.5, 3.5, 0.5, 0.5])
    assert group_normalised(shaped).tolist() == pytest.approx([-0.5, 1.5, -0.5, -0.5])


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_alpha_zero_and_equal_scores_are_vanilla_bit_for_bit(form):
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(0))
    scores = torch.randn(8, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(
        build("modify_reward", form=form, alpha=0).rewards(rewards, judged([ABSORB] * 8, scores)), rewards
    )
    noise = [3.0 + 1e-6 * score for score in scores]  # a prompt's last token, computed in several micro-batches
    assert torch.equal(build("modify_reward", form=form).rewards(rewards, judged([ABSORB] * 8, noise)), rewards)


def test_without_a_resolution_the_last_digits_of_equal_scores_would_decide():
    noise = judged([ABSORB] * 2, scores=[3.0, 3.0 + 1e-6])
    shaped = build("modify_reward", resolution=0).rewards(torch.ones(2), noise)
    assert shaped.tolist() == pytest.approx([1.0, 0.0], abs=1e-4)


def test_multiplicative_refuses_negative_rewards():
    with pytest.raises(UserError, match="set form=additive"):
        build("modify_reward").rewards(-REWARDS, ONE_HIGH)


# ---- penalize ----


def test_penalties():
    verdict = judged([ROUTE, ABSORB, ROUTE])
    rewards = torch.tensor([3.5, 3.5, 0.0])
    assert build("penalize", penalty=3.0).rewards(rewards, verdict).tolist() == [0.5, 3.5, -3.0]
    assert build("penalize").rewards(rewards, verdict).tolist() == [0.0, 3.5, 0.0]
    assert torch.equal(build("penalize", penalty=0).rewards(rewards, verdict), rewards)


@pytest.mark.parametrize(
    ("name", "settings", "hint"),
    [
        ("route", {"strict": "no"}, "true or false"),
        ("route", {"clamp_keep_advantages": 1}, "true or false"),
        ("route", {"stric": True}, "did you mean 'strict'"),
        ("route", {"head_start_steps": -1}, "at least 0"),
        ("route", {"head_start_steps": 2.5}, "integer"),
        ("route", {"head_start_steps": 2, "head_start_until": 1.5}, "share in"),
        ("route", {"head_start_steps": 2, "head_start_until": float("nan")}, "finite"),
        ("route", {"head_start_until": 0.5}, "most steps"),
        ("route", {"head_start_measure": "hack"}, "flagged, reward, swapped_reward"),
        ("route", {"head_start_unflagged": "deployed"}, "nothing, quarantine"),
        ("route", {"strict": True, "head_start_steps": 1, "head_start_unflagged": "quarantine"}, "set nothing"),
        ("none", {"strict": True}, "strict"),
        ("rout", {}, "did you mean 'route'"),
        ("screen", {"min_kept": 0}, "at least 1"),
        ("screen", {"strict": "loose"}, "true or false"),
        ("mask_advantage", {"soft": "yes"}, "true or false"),
        ("modify_reward", {"form": "both"}, "additive, multiplicative"),
        ("modify_reward", {"alpha": -1}, "at least 0"),
        ("modify_reward", {"floor": 0}, "positive"),
        ("penalize", {"penalty": -3}, "at least 0"),
    ],
)
def test_bad_configuration_is_one_line(name, settings, hint):
    with pytest.raises(UserError) as caught:
        build(name, **settings)
    assert hint in str(caught.value) and str(caught.value).startswith("grad_routing.intervention.")
