"""Detectors: scores by hand, what each may see, state, and refusals."""

import dataclasses
import hashlib
import math
import pickle

import pytest
import torch

from verl_grad_routing.detectors import DETECTORS, BatchView, Detector, NoConfig, Signal, checked_scores, view_for
from verl_grad_routing.detectors.base import GUARDED, READABLE
from verl_grad_routing.detectors.evaluation import auroc
from verl_grad_routing.directions import haar_directions
from verl_grad_routing.errors import UserError

ACTIVATION = [name for name, cls in DETECTORS.items() if cls.needs_directions]
LINEAR = [name for name in ACTIVATION if name != "linear_probe"]  # its file says all that a fit says


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("signal", Signal)
@pytest.mark.parametrize("directions", [False, True])
def test_view_shows_a_signal_its_own_fields_alone(signal, directions, make_view):
    class Probe(Detector):
        Config = NoConfig
        needs_directions = directions

        def score(self, view):
            return torch.zeros(len(view.keys))

    Probe.signal = signal
    view = view_for(Probe(NoConfig()), make_view())
    visible = {field for field in GUARDED if getattr(view, field) is not None}
    expected = {
        Signal.reward: {"proxy_reward_B"},
        Signal.monitor: {"prompts", "responses"},
        Signal.labels: {"facts", "types"},
        Signal.oracle: {"facts", "types"},
    }.get(signal, set())
    assert visible == expected == READABLE[signal]
    assert (view.activation_scores_BD is not None) == directions
    assert len(view.keys) == len(view.uids) == 12 and (view.step, view.seed) == (1, 5)


def test_scores_by_hand(make_detector, make_view):
    view = make_view(rows=4)
    assert checked_scores(make_detector("constant"), view).tolist() == [0, 0, 0, 0]
    assert checked_scores(make_detector("oracle"), view).tolist() == [1, -1, 0, 1]
    given = torch.tensor([[0.5, 9], [-1, 9], [2, 9], [0, 9]], dtype=torch.float32)
    for name in LINEAR:
        scores = checked_scores(make_detector(name), dataclasses.replace(view, activation_scores_BD=given))
        assert scores.dtype == torch.float64 and scores.tolist() == [0.5, -1, 2, 0]
    # first 53 bits of SHA-256 of "5/1/k0-0"
    by_hand = int(bin(int(hashlib.sha256(b"5/1/k0-0").hexdigest(), 16) | 1 << 256)[3:56], 2) / 2**53
    assert checked_scores(make_detector("coinflip"), view)[0] == by_hand


def test_coinflip_is_uniform_and_depends_on_seed_step_and_key_alone(make_detector, make_view):
    coin = make_detector("coinflip")
    view = make_view(rows=4000)
    scores = coin.score(view)
    assert scores.min() >= 0 and scores.max() < 1
    assert scores.mean() == pytest.approx(0.5, abs=0.02) and scores.var() == pytest.approx(1 / 12, rel=0.1)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0)).tolist()
    keys = tuple(view.keys[i] for i in order)
    assert torch.equal(coin.score(dataclasses.replace(view, keys=keys)), scores[order])
    assert not torch.equal(coin.score(dataclasses.replace(view, step=2)), scores)
    assert not torch.equal(coin.score(dataclasses.replace(view, seed=6)), scores)
    fixed = make_detector("coinflip", seed=5)
    assert torch.equal(fixed.score(dataclasses.replace(view, seed=6)), scores)


def test_persona_direction_points_from_wanted_to_unwanted(make_detector):
    detector = make_detector("persona_act", fitted=False)
    wanted = torch.zeros(3, 1, 2)
    unwanted = torch.tensor([3.0, 4]).expand(3, 1, 2)
    detector.fit(unwanted, wanted, (2,), 2, "h")
    torch.testing.assert_close(detector.directions_DLd, torch.tensor([[[0.6, 0.8]]]))
    assert detector.pair_means == (pytest.approx(5), 0)
    assert detector.direction_report() == {
        "detector/held_out_accuracy": 1.0,
        "detector/pair_unwanted_mean": pytest.approx(5),
        "detector/pair_wanted_mean": 0.0,
        "detector/pair_gap": pytest.approx(5),
    }
    detector.fit(torch.tensor([4.0, 3]).expand(3, 1, 2), wanted, (2,), 2, "h")
    assert detector.direction_report()["detector/refresh_cosine"] == pytest.approx(0.96)


def test_controls_choose_other_directions(make_detector):
    real = make_detector("persona_act").directions_DLd
    assert not torch.allclose(make_detector("persona_permuted").directions_DLd, real)
    control = make_detector("random", direction_index=2, seed=9)
    assert torch.equal(control.directions_DLd[0], haar_directions(3, (2, 3), 16, 9)[2])
    assert control.pair_means is None and control.direction_report() == {}


@pytest.mark.parametrize("name", LINEAR)
def test_state_is_exact_and_refuses_another_run(name, make_detector, make_view):
    saved = make_detector(name)
    state = pickle.loads(pickle.dumps(saved.state_dict()))
    for restored in (make_detector(name, fitted=False), make_detector(name, seed=1)):  # before and after a first fit
        restored.load_state_dict(state)
        assert torch.equal(restored.directions_DLd, saved.directions_DLd)
        assert restored.pair_means == saved.pair_means and restored.direction_report() == saved.direction_report()
        view = make_view(saved)
        assert torch.equal(checked_scores(restored, view), checked_scores(saved, view))
    assert "constant" in refusal(make_detector("constant").load_state_dict, state)
    fresh = make_detector(name, fitted=False, layers=[1, 2])
    assert "layers=[1, 2]" in refusal(fresh.load_state_dict, state)
    lax = {"min_accuracy": 0.0} if name == "concept_act" else {}  # the next pairs are noise
    other = make_detector(name, fitted=False, **lax)
    sides = (torch.randn(3, 2, 8), torch.randn(3, 2, 8)) if other.needs_pairs else (None, None)
    other.fit(*sides, (2, 3), 8, "hash" if other.needs_pairs else None)
    assert "hidden size" in refusal(other.load_state_dict, state)
    if other.needs_pairs:
        sides = (torch.randn(3, 2, 16), torch.randn(3, 2, 16))
        other = make_detector(name, fitted=False, **lax)
        other.fit(*sides, (2, 3), 16, "another hash")
        assert "another hash" in refusal(other.load_state_dict, state)
        restored = make_detector(name, fitted=False)
        restored.load_state_dict(state)
        assert "another hash" in refusal(restored.fit, *sides, (2, 3), 16, "another hash")
    broken = {**state, "direction": {**state["direction"], "vectors_Ld": torch.zeros(2, 5)}}
    assert "(2, 16)" in refusal(make_detector(name, fitted=False).load_state_dict, broken)


def test_state_is_not_changed_by_what_happens_after_saving(make_detector):
    detector = make_detector("persona_act")
    state = detector.state_dict()
    detector.direction.vectors_Ld.zero_()
    assert state["direction"]["vectors_Ld"].norm() > 1


def test_layers_and_score_pass(make_detector):
    assert make_detector("random").resolve_layers(36) == tuple(range(21, 28))
    assert make_detector("random", depth=[0.5, 0.5]).resolve_layers(4) == (2,)
    assert make_detector("random", layers=[3, 1]).resolve_layers(4) == (1, 3)
    message = refusal(make_detector("random", layers=[3, 5]).resolve_layers, 4)
    assert "layers=[3, 5]" in message and "1 to 4" in message
    assert make_detector("random").resolve_score_pass(reference_in_actor=True) == "reference"
    assert make_detector("random").resolve_score_pass(reference_in_actor=False) == "policy"
    assert make_detector("random", score_pass="ablated").resolve_score_pass(reference_in_actor=True) == "ablated"


BAD_CONFIGS = [
    ("persona_act", {"pairs": ""}, "pairs"),
    ("persona_act", {"pairs": 3}, "pairs"),
    ("persona_act", {"layer": [1]}, "did you mean 'layers'"),
    ("random", {"layers": []}, "layers"),
    ("random", {"layers": [0]}, "at least 1"),
    ("random", {"layers": [1, 1]}, "different"),
    ("random", {"layers": 3}, "list"),
    ("random", {"layers": "all"}, "list"),
    ("random", {"depth": [0.8, 0.6]}, "lower one first"),
    ("random", {"depth": [0.6]}, "two shares"),
    ("random", {"depth": [0.6, 60]}, "from 0 to 1"),
    ("random", {"score_pass": "ref"}, "auto, reference, policy, ablated"),
    ("random", {"refresh_every": 5}, "never re-extracted"),
    ("persona_act", {"refresh_every": -1}, "at least 0"),
    ("persona_act", {"refresh_every": 2, "score_pass": "reference"}, "does not change"),
    ("random", {"seed": 0.5}, "integer"),
    ("random", {"direction_index": -1}, "at least 0"),
    ("coinflip", {"seed": "x"}, "integer"),
    ("oracle", {"strength": 1}, "strength"),
    ("persona", {}, "did you mean"),
]


@pytest.mark.parametrize(("name", "settings", "hint"), BAD_CONFIGS)
def test_bad_configuration_is_one_line(name, settings, hint):
    message = refusal(DETECTORS.build, {"name": name, **settings}, "grad_routing.detector")
    assert message.startswith("grad_routing.detector.") and hint in message


def test_use_before_fit_and_bad_activations(make_detector, make_view):
    detector = make_detector("persona_act", fitted=False)
    assert "call fit" in refusal(lambda: detector.directions_DLd)
    assert "call fit" in refusal(lambda: detector.pair_means)
    assert "pairs' hash" in refusal(detector.fit, torch.zeros(2, 1, 4), torch.ones(2, 1, 4), (1,), 4)
    assert "pairs' hash" in refusal(detector.fit, None, None, (1,), 4, "h")
    assert "[P, 2, 4]" in refusal(detector.fit, torch.zeros(2, 1, 4), torch.ones(2, 1, 4), (1, 2), 4, "h")
    view = dataclasses.replace(make_view(), activation_scores_BD=None)
    assert "activation scores" in refusal(checked_scores, make_detector("persona_act"), view)
    view = dataclasses.replace(make_view(), activation_scores_BD=torch.zeros(12))
    assert "[B, D]" in refusal(checked_scores, make_detector("persona_act"), view)
    view = dataclasses.replace(make_view(), facts={"hack": torch.zeros(12)})
    assert "'solve'" in refusal(checked_scores, make_detector("oracle"), view)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_detector_and_rollout(value, make_detector, make_view):
    scores = torch.zeros(12, 1)
    scores[7] = value
    message = refusal(
        checked_scores, make_detector("random"), dataclasses.replace(make_view(), activation_scores_BD=scores)
    )
    assert "random" in message and "k0-7" in message and str(value) in message


def test_scores_of_another_length_are_refused(make_view):
    class Short(Detector):
        name = "short"
        signal = Signal.none
        Config = NoConfig

        def score(self, view):
            return torch.zeros(3)

    message = refusal(checked_scores, Short(NoConfig()), make_view())
    assert "short" in message and "(3,)" in message and "12" in message


def test_views_of_unequal_columns_or_with_repeated_keys_are_refused():
    base = {"keys": ("a", "b"), "uids": ("u", "u"), "step": 1, "seed": 0}
    for field, value in (("uids", ("u",)), ("proxy_reward_B", torch.zeros(3)), ("facts", {"hack": torch.zeros(1)})):
        assert field in refusal(BatchView, **{**base, field: value})
    assert "keys" in refusal(BatchView, **{**base, "keys": ("a", "a")})


def test_auroc():
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8], dtype=torch.float64)
    assert auroc(scores, torch.tensor([0, 0, 1, 1])) == 0.75
    assert auroc(torch.zeros(4), torch.tensor([True, False, True, False])) == 0.5
    assert math.isnan(auroc(scores, torch.zeros(4))) and math.isnan(auroc(scores, torch.ones(4)))
