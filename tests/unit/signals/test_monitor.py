"""The monitor: rules, judges, dials."""

import dataclasses
import math

import pytest
import torch

from verl_grad_routing.detectors import checked_scores
from verl_grad_routing.errors import UserError


def test_rules_are_searched_in_the_response(make_detector, make_view):
    view = dataclasses.replace(make_view(rows=4), responses=("11111~", "a11111", "1111\n1", ""))
    assert checked_scores(make_detector("monitor", rules=[r"^([0-9])\1{4}"]), view).tolist() == [1, 0, 0, 0]
    assert checked_scores(make_detector("monitor", rules=["a", "^$"]), view).tolist() == [0, 1, 0, 1]
    assert checked_scores(make_detector("monitor", rules=["1.1"]), view).tolist() == [1, 1, 1, 0]


def test_a_judge_reads_prompt_and_response(make_detector, make_view):
    view = dataclasses.replace(make_view(rows=2), prompts=("a", "b"), responses=("a", "c"))
    assert checked_scores(make_detector("monitor", judge=f"{__name__}:same"), view).tolist() == [0.75, 0.25]


def same(prompt: str, response: str) -> float:
    return 0.75 if prompt == response else 0.25


def wild(prompt: str, response: str) -> float:
    return math.nan


def test_dials_turn_their_share_of_verdicts(make_detector, make_view):
    view = make_view(rows=4000)  # every second response ends in an even digit
    plain = checked_scores(make_detector("monitor"), view)
    dialled = checked_scores(make_detector("monitor", recall=0.7, false_positive_rate=0.1), view)
    assert plain.mean() == pytest.approx(0.5)
    assert dialled[plain == 1].mean() == pytest.approx(0.7, abs=0.03)
    assert dialled[plain == 0].mean() == pytest.approx(0.1, abs=0.02)
    again = checked_scores(make_detector("monitor", recall=0.7, false_positive_rate=0.1), view)
    assert torch.equal(dialled, again)
    assert checked_scores(make_detector("monitor", recall=0), view).sum() == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rules": None}, "rules=None: give either rules"),
        ({"rules": ["a"], "judge": "m:f"}, "give either rules"),
        ({"rules": []}, "at least one"),
        ({"rules": "a"}, "give a list"),
        ({"rules": ["("]}, "not a regular expression"),
        ({"rules": None, "judge": "nothing"}, "package.module:function"),
        ({"rules": None, "judge": "no_such_module:f"}, "cannot be imported"),
        ({"rules": None, "judge": "math:no_such"}, "cannot be imported"),
        ({"rules": None, "judge": "math:pi"}, "must be a function"),
        ({"rules": ["a"], "recall": 2}, "from 0 to 1"),
    ],
)
def test_bad_configuration_is_one_line(settings, told, make_detector):
    from verl_grad_routing.detectors import DETECTORS

    with pytest.raises(UserError, match=r"grad_routing\.detector") as caught:
        DETECTORS.build({"name": "monitor", **settings}, "grad_routing.detector")
    assert told in str(caught.value)


@pytest.mark.parametrize("judge", ["wild", "as_text"])
def test_a_judge_must_return_a_number_in_range(judge, make_detector, make_view):
    with pytest.raises(UserError, match=r"rollout k0-0.*a number from 0 to 1"):
        checked_scores(make_detector("monitor", judge=f"{__name__}:{judge}"), make_view(rows=1))


def as_text(prompt: str, response: str) -> str:
    return "yes"
