"""Directions in gradient space: scores of the pairs by hand, state, refusals; and bottleneck activations."""

import math

import pytest
import torch

from verl_grad_routing.bottleneck import Bottleneck
from verl_grad_routing.detectors import DETECTORS, GradientDetector
from verl_grad_routing.directions import haar_directions
from verl_grad_routing.errors import UserError

MODULES = ("1.q_proj", "2.q_proj")
# two modules, rank 2; unwanted minus wanted is (3, 4), (0, 2) on average
UNWANTED = torch.tensor([[[4.0, 4.0], [1.0, 3.0]], [[3.0, 5.0], [1.0, 2.0]]])
WANTED = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 0.0]]])
DIGEST = torch.tensor([1.0, 2.0], dtype=torch.float64)


def build(name="persona_grad", **settings):
    pairs = {} if name == "random_grad" else {"pairs": "pairs.jsonl"}
    detector = DETECTORS.build({"name": name, "rank": 2, **pairs, **settings}, "grad_routing.detector")
    assert isinstance(detector, GradientDetector)
    return detector


def placed(detector, layers=(1, 2), digest=DIGEST):
    detector.place(layers)
    detector.placed(digest)
    return detector


def fitted(name="persona_grad", **settings):
    detector = placed(build(name, **settings))
    sides = (UNWANTED, WANTED) if detector.needs_pairs else (None, None)
    detector.fit(*sides, MODULES, 2, "hash" if detector.needs_pairs else None)
    return detector


def test_the_direction_is_a_unit_vector_in_each_module():
    detector = fitted()
    assert torch.equal(detector.directions_DLd, torch.tensor([[[0.6, 0.8], [0.0, 1.0]]]))
    # mean over modules of the projections: (.6 * 4 + .8 * 4 + 3) / 2 = 4.3
    unwanted, wanted = detector.pair_scores
    torch.testing.assert_close(unwanted, torch.tensor([4.3, 3.9], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(wanted, torch.tensor([1.2, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_cosines_are_of_all_modules_together():
    detector = fitted(score="cosine")
    unwanted, wanted = detector.pair_scores
    first = 8.6 / (math.sqrt(16 + 16 + 1 + 9) * math.sqrt(2))
    assert unwanted[0] == pytest.approx(first, rel=1e-6) and detector.cosine
    assert detector.pair_means == (pytest.approx(float(unwanted.mean())), pytest.approx(float(wanted.mean())))
    assert torch.equal(detector.directions_DLd, fitted().directions_DLd)


def test_where_it_reads():
    detector = build()
    assert detector.resolve_layers(36) == tuple(range(1, 37)) and detector.resolve_score_pass(True) == "ablated"
    assert build(layers=[2], score_pass="reference").resolve_score_pass(True) == "reference"
    place = build(targets=["v_proj"], coordinates="lora", basis_seed=3).place((2, 4))
    assert place == Bottleneck((2, 4), ("v_proj",), 2, "lora", 3)


def test_the_control_is_random_in_the_same_space():
    detector = fitted("random_grad", direction_index=1, seed=9)
    assert torch.equal(detector.directions_DLd[0], haar_directions(2, MODULES, 2, 9)[1])
    assert detector.pair_scores is None and not torch.equal(detector.directions_DLd, fitted().directions_DLd)


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_a_resumed_run_has_the_saved_direction(score):
    saved = fitted(score=score)
    saved.fit(UNWANTED + torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0)), WANTED, MODULES, 2, "hash")
    state = saved.state_dict()
    resumed = fitted(score=score)  # at the untrained model, as a resumed run starts
    assert not torch.equal(resumed.directions_DLd, saved.directions_DLd)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.directions_DLd, saved.directions_DLd)
    assert all(torch.equal(one, other) for one, other in zip(resumed.pair_scores, saved.pair_scores, strict=True))
    assert resumed.refresh_cosine == saved.refresh_cosine and 0 < saved.refresh_cosine < 1


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"rank": 3}, "detector.rank=3: the run was started with 2"),
        ({"coordinates": "lora"}, "detector.coordinates='lora': the run was started with 'svd'"),
        ({"targets": ["q_proj"]}, "detector.targets"),
        ({"basis_seed": 1}, "detector.basis_seed=1"),
        ({"score": "cosine"}, "detector.score='cosine': the run was started with 'dot'"),
    ],
)
def test_a_state_of_other_coordinates_is_refused(other, told):
    state = fitted().state_dict()
    with pytest.raises(UserError) as caught:
        placed(build(**other)).load_state_dict(state)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_state_of_other_weights_layers_or_pairs_is_refused():
    state = fitted().state_dict()
    placed(build(), digest=DIGEST * (1 + 1e-6)).load_state_dict(state)  # another machine's rounding
    with pytest.raises(UserError, match="base model's weights differ"):
        placed(build(), digest=DIGEST * 1.1).load_state_dict(state)
    with pytest.raises(UserError, match=r"detector\.layers=\(1,\)"):
        placed(build(), layers=(1,)).load_state_dict(state)
    other = placed(build())
    other.fit(UNWANTED, WANTED, MODULES, 2, "another hash")
    with pytest.raises(UserError, match="content hash"):
        other.load_state_dict(state)


def test_a_state_of_the_residual_stream_is_no_state_of_a_bottleneck(make_detector):
    state = make_detector("persona_act").state_dict()
    bottleneck = make_detector("persona_act", coordinates="svd", fitted=False)
    bottleneck.place((2, 3))
    with pytest.raises(UserError, match=r"detector\.coordinates='svd': the run was started with 'residual'"):
        bottleneck.load_state_dict(state)
    assert make_detector("persona_act").place((2, 3)) is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"score_pass": "policy"}, "ablated, reference"),
        ({"coordinates": "residual"}, "svd, lora"),
        ({"score": "sum"}, "dot, cosine"),
        ({"rank": 0}, "at least 1"),
        ({"targets": []}, "linear layers"),
        ({"targets": ["q_proj", "q_proj"]}, "different"),
        ({"score_pass": "reference", "refresh_every": 5}, "set 0"),
        ({"pairs": ""}, "path.jsonl"),
    ],
)
def test_bad_configuration_is_one_line(settings, told):
    with pytest.raises(UserError, match=r"grad_routing\.detector") as caught:
        build(**settings)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_one_vector_for_all_modules_is_refused(make_detector):
    with pytest.raises(UserError, match="coordinates='svd': set residual"):
        make_detector("concept_act", coordinates="svd")
