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
        ({"precision": 1}, "known:"),
    ],
)
def test_bad_configuration_is_one_line(settings, hint):
    with pytest.raises(UserError) as caught:
        build(**settings)
    assert hint in str(caught.value) and "\n" not in str(caught.value)
