"""Partial and noisy labels: who is flagged, who is trusted, by which draw."""

import dataclasses
import hashlib

import pytest
import torch

from verl_grad_routing.config import build_methods, parse
from verl_grad_routing.detectors import DETECTORS, BatchView, checked_scores
from verl_grad_routing.errors import UserError

# rows: hack of the known type, of an unknown one, solution, neither; prompts of both kinds for the last two
HACK, SOLVE, KNOWN = [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0]


def build(**settings):
    return DETECTORS.build({"name": "labels", **settings}, "grad_routing.detector")


def view(copies=1, seed=5, step=1, group=2):
    rows = 6 * copies
    facts = {
        name: torch.tensor(column * copies, dtype=torch.float64)
        for name, column in {"hack": HACK, "solve": SOLVE, "known": KNOWN}.items()
    }
    keys = tuple(f"k{row}" for row in range(rows))
    uids = tuple(f"u{row // group}" for row in range(rows))
    return BatchView(keys=keys, uids=uids, step=step, seed=seed, facts=facts)


def scores(detector, batch):
    return checked_scores(detector, batch)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 0, 0, 0, 0]),
        ({"types": "known"}, [1, 0, 0, 0, 0, 0]),
        ({"types": "unknown"}, [0, 1, 0, 0, 0, 0]),
        ({"recall": 0}, [0, 0, 0, 0, 0, 0]),
        ({"types": "known", "clean_recall": 1}, [1, 0, -1, -1, 0, 0]),
        ({"types": "known", "recall": 0, "clean_recall": 1}, [0, 0, -1, -1, 0, 0]),
        # a flag by error outweighs trust, and a hack of another type is no error of the labeller
        ({"types": "known", "false_positive_rate": 1, "clean_recall": 1}, [1, 0, 1, 1, 1, 1]),
        ({"recall": 0, "false_positive_rate": 1}, [0, 0, 1, 1, 1, 1]),
        ({"false_positive_rate": 1, "clean_recall": 1, "prompt_share": 0}, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_by_hand(settings, expected):
    assert scores(build(**settings), view()).tolist() == expected


def test_the_draw_by_hand():
    digest = hashlib.sha256(b"labels/flag/5/1/k0").digest()
    draw = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    assert 0 < draw < 1
    assert scores(build(recall=draw), view())[0] == 0  # strictly below
    assert scores(build(recall=draw + 1e-12), view())[0] == 1
    assert (
        scores(build(recall=draw + 1e-12, seed=6), view(seed=5))[0]
        == scores(build(recall=draw + 1e-12), view(seed=6))[0]
    )


def test_rates_are_the_dials():
    copies = 5000
    batch = view(copies)
    found = scores(build(recall=0.3, false_positive_rate=0.1, clean_recall=0.6), batch).reshape(copies, 6)
    assert (found[:, :2] == 1).double().mean() == pytest.approx(0.3, abs=0.015)
    assert (found[:, 2:] == 1).double().mean() == pytest.approx(0.1, abs=0.01)
    solved = found[:, 2:4]
    # of those not flagged: the draws for trust are independent of those for flags
    assert (solved == -1).double().sum() / (solved < 1).double().sum() == pytest.approx(0.6, abs=0.015)
    assert not (found[:, :2] == -1).any() and not (found[:, 4:] == -1).any()


def test_prompts_are_labelled_whole():
    copies = 3000
    found = scores(build(false_positive_rate=1.0, prompt_share=0.25), view(copies, group=6)).reshape(copies, 6)
    per_prompt = found.sum(dim=1)
    assert set(per_prompt.tolist()) == {0, 6}
    assert (per_prompt == 6).double().mean() == pytest.approx(0.25, abs=0.025)


def test_a_higher_recall_labels_the_same_rollouts_and_more():
    batch = view(200)
    few, many = (scores(build(recall=recall), batch) > 0 for recall in (0.2, 0.6))
    assert few.any() and (many | ~few).all() and many.sum() > few.sum()


def test_other_steps_and_seeds_draw_anew_and_the_same_ones_again():
    detector, batch = build(recall=0.5), view(50)
    first = scores(detector, batch)
    assert torch.equal(scores(build(recall=0.5), view(50)), first)
    assert not torch.equal(scores(detector, view(50, step=2)), first)
    assert not torch.equal(scores(detector, view(50, seed=6)), first)
    assert torch.equal(scores(build(recall=0.5, seed=5), view(50, seed=6)), first)


def test_a_draw_knows_no_neighbour():
    detector = build(recall=0.5, false_positive_rate=0.5, clean_recall=0.5, prompt_share=0.5)
    batch = view(20)
    whole = scores(detector, batch)
    for row in (0, 7, 50):
        alone = dataclasses.replace(
            batch,
            keys=(batch.keys[row],),
            uids=(batch.uids[row],),
            facts={name: column[[row]] for name, column in (batch.facts or {}).items()},
        )
        assert scores(detector, alone)[0] == whole[row]


TYPES = ("leak", "blank", "leak", "blank", "leak", "blank")


def test_recall_by_type():
    batch = dataclasses.replace(view(), types=TYPES)
    assert scores(build(type_recall={"leak": 0.0}), batch).tolist() == [0, 1, 0, 0, 0, 0]
    assert scores(build(type_recall={"blank": 1.0}, recall=0.0), batch).tolist() == [0, 1, 0, 0, 0, 0]
    many = dataclasses.replace(view(3000), types=TYPES * 3000)
    found = scores(build(type_recall={"leak": 0.8}, recall=0.2), many).reshape(3000, 6)
    assert found[:, 0].mean() == pytest.approx(0.8, abs=0.03) and found[:, 1].mean() == pytest.approx(0.2, abs=0.03)
    with pytest.raises(UserError, match="the grader's fact 'loophole'"):
        scores(build(type_recall={"leak": 1.0}), view())


def test_precision_is_that_share_of_the_flags():
    copies = 5000
    for settings, recall in (({}, 1.0), ({"recall": 0.5}, 0.5), ({"types": "known"}, 0.5)):
        found = scores(build(precision=0.8, **settings), view(copies)).reshape(copies, 6)
        right, wrong = (found[:, :2] == 1).sum(), (found[:, 2:] == 1).sum()
        assert float(right) / (2 * copies) == pytest.approx(recall, abs=0.02)
        assert float(right / (right + wrong)) == pytest.approx(0.8, abs=0.02)
    # by hand: 2 hacks of 6, all flagged: rate 2 * .2 / (.8 * 4); too low a precision flags every rollout
    assert scores(build(precision=0.01), view()).tolist() == [1] * 6
    assert scores(build(precision=1.0), view()).tolist() == [1, 1, 0, 0, 0, 0]


def test_flips_turn_flags_both_ways():
    assert scores(build(flip_rate=1.0), view()).tolist() == [0, 0, 1, 1, 1, 1]
    copies = 4000
    plain, noisy = scores(build(), view(copies)), scores(build(flip_rate=0.1), view(copies))
    assert float((plain != noisy).double().mean()) == pytest.approx(0.1, abs=0.01)
    assert not scores(build(flip_rate=1.0, prompt_share=0), view()).any()  # what is not labelled cannot be wrong
    alone = dataclasses.replace(view(), keys=("k3",), uids=("u1",), facts={"hack": torch.zeros(1)})
    assert scores(build(flip_rate=0.5), alone)[0] == scores(build(flip_rate=0.5), view())[3]


def test_facts_that_are_missing_are_named():
    for settings, missing in (({}, "hack"), ({"types": "known"}, "known"), ({"clean_recall": 0.5}, "solve")):
        batch = view()
        facts = {name: column for name, column in (batch.facts or {}).items() if name != missing}
        with pytest.raises(UserError, match=f"the grader's fact '{missing}'"):
            scores(build(**settings), dataclasses.replace(batch, facts=facts))


@pytest.mark.parametrize(
    ("settings", "control"),
    [
        ({}, True),
        ({"clean_recall": 1.0, "false_positive_rate": 0.1}, True),
        ({"recall": 0.99}, False),
        ({"types": "known"}, False),
        ({"prompt_share": 0.5}, False),
        ({"flip_rate": 0.1}, False),
        ({"type_recall": {"leak": 0.5}}, False),
        ({"type_recall": {"leak": 1.0}}, True),
    ],
)
def test_complete_labels_are_a_control(settings, control):
    detector = {"name": "labels", **settings}
    build_methods(parse({"detector": detector, "control": True}))
    if control:
        with pytest.raises(UserError, match=r"grad_routing\.control=true"):
            build_methods(parse({"detector": detector}))
    else:
        build_methods(parse({"detector": detector}))


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"types": "leak"}, "all, known, unknown"),
        ({"recall": 1.5}, "from 0 to 1"),
        ({"false_positive_rate": -0.1}, "from 0 to 1"),
        ({"clean_recall": True}, "from 0 to 1"),
        ({"prompt_share": "half"}, "from 0 to 1"),
        ({"seed": -1}, "at least 0"),
        ({"accuracy": 1}, "known:"),
        ({"flip_rate": 1.1}, "from 0 to 1"),
        ({"precision": 0}, "more than 0"),
        ({"precision": 0.9, "false_positive_rate": 0.1}, "precision decides"),
        ({"type_recall": {}}, "loophole type: recall"),
        ({"type_recall": {"leak": 2}}, "type_recall.leak"),
        ({"type_recall": {"leak": 1}, "types": "known"}, "set types=all"),
    ],
)
def test_bad_configuration_is_one_line(settings, hint):
    with pytest.raises(UserError) as caught:
        build(**settings)
    assert hint in str(caught.value) and "\n" not in str(caught.value)
