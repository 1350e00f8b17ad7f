"""The classifier: what it is asked, what it may answer, and which answers are turned round."""

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch

from verl_grad_routing.detectors import DETECTORS, checked_scores
from verl_grad_routing.errors import UserError

SEEN: list[tuple[list[str], list[str]]] = []


def lengths(prompts, responses):
    SEEN.append((prompts, responses))
    return np.array([len(prompt) - len(response) for prompt, response in zip(prompts, responses, strict=True)])


def as_tensor(prompts, responses):
    return torch.full((len(prompts),), 0.25)


def too_few(prompts, responses):
    return [0.5] * (len(prompts) - 1)


def nothing(prompts, responses):
    return None


def text(prompts, responses):
    return "x" * len(prompts)


def outside(prompts, responses):
    return [0.5, 1.5, 0.5][: len(prompts)]


def not_a_number(prompts, responses):
    return [math.nan] * len(prompts)


def build(function="lengths", **settings):
    path = f"{__name__}:{function}" if ":" not in function else function
    return DETECTORS.build({"name": "classifier", "function": path, **settings}, "grad_routing.detector")


def test_it_is_called_with_texts_in_batches(make_view):
    SEEN.clear()
    view = dataclasses.replace(make_view(rows=3), prompts=("a", "bb", "ccc"), responses=("xx", "", "x"))
    scores = checked_scores(build(low=-5, high=5, batch_size=2), view)
    assert scores.tolist() == [-1, 2, 2] and scores.dtype == torch.float64
    assert SEEN == [(["a", "bb"], ["xx", ""]), (["ccc"], ["x"])]
    assert checked_scores(build("as_tensor"), view).tolist() == [0.25] * 3


def test_flips_are_mirrored_and_drawn_by_key(make_view):
    view = make_view(rows=4000)
    plain = checked_scores(build("as_tensor", high=2.0), view)
    flipped = checked_scores(build("as_tensor", high=2.0, flip_rate=0.3), view)
    assert plain.tolist() == [0.25] * 4000
    assert set(flipped.tolist()) == {0.25, 1.75}  # low + high - s
    assert float((flipped == 1.75).double().mean()) == pytest.approx(0.3, abs=0.03)
    draw = (int.from_bytes(hashlib.sha256(b"classifier/5/1/k0-7").digest()[:8], "big") >> 11) / 2**53
    for rate, turned in ((draw, False), (draw + 1e-12, True)):
        assert bool(checked_scores(build("as_tensor", flip_rate=rate), view)[7] == 0.75) is turned
    assert torch.equal(flipped, checked_scores(build("as_tensor", high=2.0, flip_rate=0.3, seed=5), view))
    assert not torch.equal(flipped, checked_scores(build("as_tensor", high=2.0, flip_rate=0.3, seed=6), view))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("too_few", "function=2: must return a sequence of 3 numbers"),
        ("nothing", "NoneType"),
        ("text", "str"),
        ("outside", "rollout k0-1=1.5: must return numbers from 0 to 1"),
        ("not_a_number", "rollout k0-0=nan"),
    ],
)
def test_what_it_must_return(function, told, make_view):
    with pytest.raises(UserError) as caught:
        checked_scores(build(function), make_view(rows=3))
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"function": ""}, "package.module:function"),
        ({"function": "nothing"}, "package.module:function"),
        ({"function": "no_such_module:f"}, "cannot be imported"),
        ({"function": "math:pi"}, "must be a function of (prompts, responses)"),
        ({"low": 1, "high": 1}, "more than low"),
        ({"flip_rate": 2}, "from 0 to 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_configuration_is_one_line(settings, told):
    with pytest.raises(UserError, match=r"grad_routing\.detector") as caught:
        DETECTORS.build({"name": "classifier", "function": f"{__name__}:lengths", **settings}, "grad_routing.detector")
    assert told in str(caught.value)
