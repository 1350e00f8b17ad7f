"""Gradients of methods in shadow are those of the float64 reference, and comparing them leaves no trace."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.engine.reference import DEFAULT, STRICT, Reference
from tests.engine.rollouts import KEEP, RICH, Rollout
from tests.engine.scenarios_comparison import methods
from tests.engine.scenarios_probe import FEEDS
from tests.engine.scenarios_quarantine_off import FEEDS as OFF_FEEDS
from tests.engine.scenarios_quarantine_off import half_off
from tests.engine.test_quarantine_off import ALONE, OFF

pytestmark = pytest.mark.timeout(600)

NAMES = ("same", "absorb", "strict", "all routed", "screened", "reversed", "kept")


@pytest.fixture(scope="module")
def expected(reference, inputs) -> dict[str, float]:
    return cosines(reference(), inputs.rollouts)


@pytest.fixture(scope="module")
def expected_off(reference, inputs) -> dict[str, float]:
    """Where half of the rows were sampled with the quarantine off, and train so."""
    return cosines(reference(), half_off(inputs.rollouts))


def cosines(own: Reference, rollouts: list[Rollout]) -> dict[str, float]:
    """From whole gradients of the reference, one rollout at a time, in float64."""
    found: dict[str, float] = {}
    gradients = {}
    for name, rows in methods(rollouts).items():
        if name == "kept":  # under another gate than they were sampled under: their ratio starts at 1
            rows = [replace(row, old_log_probs=_under_its_gate(own, row)) for row in rows]
        rows = [replace(row, route=row.route + OFF * row.off) for row in rows]
        if name in ("arm", *NAMES):
            gradients[name] = own.gradients(rows, RICH, {**(STRICT if name == "strict" else DEFAULT), **ALONE})
    for name in NAMES:
        for key, block in (("gradient_cosine", ".lora_"), ("gradient_cosine_deployed", ".default.")):
            ours, theirs = (
                torch.cat([g.flatten().double() for key_, g in sorted(gradients[which].items()) if block in key_])
                for which in ("arm", name)
            )
            norms = ours.norm() * theirs.norm()
            found[f"{name}/{key}"] = float(ours @ theirs / norms) if norms > 0 else math.nan
            if key == "gradient_cosine":
                found[f"{name}/gradient_norm_ratio"] = float(theirs.norm() / ours.norm())
    return found


def _under_its_gate(own: Reference, row: Rollout) -> torch.Tensor:
    if row.route != KEEP or row.off:
        return row.old_log_probs
    return own.log_probs(row, (1, 0), RICH.temperature).detach()


@pytest.mark.parametrize("feed", ["packed", "padded", "stale", "replicated"])
def test_cosines_are_those_of_the_reference(feed, world, expected):
    found = world["comparison"][feed]
    for key, want in expected.items():
        assert math.isnan(found[key]) if math.isnan(want) else found[key] == pytest.approx(want, abs=2e-5), key


@pytest.mark.parametrize("feed", OFF_FEEDS)
def test_rows_sampled_with_the_quarantine_off_train_so_in_every_gradient(feed, world, expected_off):
    found = world["comparison"][f"quarantine off {feed}"]
    for key, want in expected_off.items():
        assert math.isnan(found[key]) if math.isnan(want) else found[key] == pytest.approx(want, abs=2e-5), key
    assert expected_off["same/gradient_cosine"] == pytest.approx(1) == expected_off["same/gradient_norm_ratio"]


def test_the_cases_differ(expected):
    """Not one of them is trivially 1, but for the method that is the same."""
    assert expected["same/gradient_cosine"] == pytest.approx(1) == expected["same/gradient_norm_ratio"]
    others = {name: expected[f"{name}/gradient_cosine"] for name in NAMES if name != "same"}
    assert len({round(value, 3) for value in others.values()}) == len(others) and max(others.values()) < 0.99
    assert math.isnan(expected["all routed/gradient_cosine_deployed"])


def test_comparing_leaves_nothing_behind(world):
    """Parameters, optimizer state, gradients, random numbers and metrics of two steps are bitwise those without."""
    left = world["comparison"]["left"]
    assert left["moved"] == []
    ends, metrics = left["ends"], left["metrics"]
    assert ends["with"].keys() == ends["without"].keys()
    assert all(torch.equal(value, ends["without"][name]) for name, value in ends["with"].items())
    told = {name: {key: getattr(v, "values", v) for key, v in found.items()} for name, found in metrics.items()}
    assert told["with"] == told["without"] and len(told["with"]) > 8


@pytest.mark.parametrize("feed", FEEDS)
def test_several_detectors_are_read_in_one_pass(feed, world):
    """Other layers, other positions, other numbers of directions: each gets the bits that it gets alone."""
    found = world["comparison"]["projections"][feed]
    assert found["columns"] == ["activation_scores_policy", "log_probs"]
    assert all(torch.equal(both, alone) for both, alone in zip(found["both"], found["alone"], strict=True))
    assert all(row.shape == (3,) and row.dtype == torch.float64 for row in found["both"])
