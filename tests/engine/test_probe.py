"""Activations that the engine pools are those of transformers' own residual stream, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from tests.engine.rollouts import HIDDEN, LAYERS
from tests.engine.scenarios_probe import vectors
from verl_grad_routing.directions import project

pytestmark = pytest.mark.timeout(600)

FEEDS = ["packed", "rows of one", "padded", "padded rows of two", "dynamic", "dynamic padded"]
FEEDS += [f"bucket {feed}" for feed in FEEDS if "padded" not in feed]


def pooled(own, row, gate=(1, 1)):
    """[layers, d]: mean over counting completion tokens, zeros without any."""
    tokens = torch.nonzero(row.mask).flatten() + len(row.prompt)
    hidden = torch.stack(own.residual_stream(row, gate))
    return hidden[:, tokens].mean(1) if len(tokens) else torch.zeros(LAYERS, HIDDEN)


@pytest.fixture(scope="module")
def expected(reference, inputs):
    own = reference()
    gates = {"policy": (1, 1), "ablated": (1, 0), "base": (0, 0)}
    return {name: [pooled(own, row, gate) for row in inputs.rollouts] for name, gate in gates.items()}


def close(actual, expected, tolerance=4e-5):
    for have, want in zip(actual, expected, strict=True):
        assert (have.double() - want.flatten()).abs().max() < tolerance


@pytest.mark.parametrize("feed", FEEDS)
def test_pooled_activations(feed, world, expected):
    close(world["probe"][feed]["pooled"], expected["policy"])


@pytest.mark.parametrize("feed", FEEDS)
def test_projections(feed, world, expected):
    """Mean over the asked layers (the last and the first, in that order) of inner products."""
    generator = torch.Generator().manual_seed(5)
    vectors = torch.randn(2, 2, HIDDEN, generator=generator, dtype=torch.float64)
    want = [torch.stack([(row[[LAYERS - 1, 0]] * v).sum() / 2 for v in vectors]) for row in expected["policy"]]
    close(world["probe"][feed]["scores"], want)


@pytest.mark.parametrize("feed", ["packed", "padded rows of two"])
def test_features_are_what_was_projected(feed, world):
    """Handed over beside the projections: a later direction gives them the scores that a worker would have given."""
    found, pooled = world["probe"][f"features {feed}"], world["probe"][feed]["pooled"]
    assert sorted(found) == ["s", "s_features_1"]
    for scores, features, row in zip(found["s"], found["s_features_1"], pooled, strict=True):
        features_1Ld = features.view(1, 2, HIDDEN)
        close([features_1Ld[0].flatten()], [row.view(LAYERS, HIDDEN)[[LAYERS - 1, 0]]])
        assert torch.equal(project(features_1Ld, vectors())[0], scores[1:])


def test_activations_of_the_ablated_and_the_bare_model(world, expected):
    for name in ("ablated", "base"):
        close(world["probe"][name], expected[name])
        assert max((a - b).abs().max() for a, b in zip(expected[name], expected["policy"], strict=True)) > 0.1


@pytest.mark.parametrize("feed", ["packed", "padded rows of two"])
@pytest.mark.parametrize("position", ["resp_last", "prompt_last"])
def test_activations_at_one_position(position, feed, world, reference, inputs):
    def at(row):
        counting = torch.nonzero(row.mask).flatten() + len(row.prompt)
        if not len(counting):
            return torch.zeros(LAYERS, HIDDEN)
        token = int(counting[-1]) if position == "resp_last" else len(row.prompt) - 1
        return torch.stack(own.residual_stream(row, (1, 1)))[:, token]

    own = reference()
    # one token is not averaged, so float32's error of a single activation counts
    close(world["probe"][f"{position} {feed}"], [at(row) for row in inputs.rollouts], tolerance=2e-4)


def test_neighbours_do_not_matter(world):
    alone = world["probe"]["rows of one"]
    for feed in FEEDS:
        for key in ("pooled", "scores"):
            for row, by_itself in zip(world["probe"][feed][key], alone[key], strict=True):
                assert (row - by_itself).abs().max() < 4e-5


def test_without_a_request_nothing_is_read(world):
    assert world["probe"]["outputs without a request"] == ["log_probs"]
    assert world["probe"]["heard in training"] == 0


def test_a_layer_that_does_not_exist_is_refused(world):
    for layer, told in zip((0, LAYERS + 1), world["probe"]["out of range"], strict=True):
        assert told.startswith(f"grad_routing.detector.layers={layer}") and f"1 to {LAYERS}" in told
