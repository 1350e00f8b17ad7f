"""The engine's fingerprints are those of plain autograd, one rollout at a time, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.func import functional_call

from tests.engine.rollouts import LAYERS
from tests.engine.scenarios_fingerprints import PROBE
from tests.engine.scenarios_probe import FEEDS
from verl_grad_routing.fingerprints import streams

pytestmark = pytest.mark.timeout(600)

KINDS = [*FEEDS, *(f"kept {feed}" for feed in FEEDS), "bucket packed"]


def fingerprint(own, row) -> torch.Tensor:
    """From the definition: the dense gradient of every effective weight, times Aᵀ, times the dense projection."""
    weights = {name: value.detach().requires_grad_() for name, value in own.weights((1, 1)).items()}
    output = functional_call(own.model, weights, (row.tokens[None],), {"use_cache": False})
    log_probs = output.logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
    nll = -(log_probs.gather(1, row.response[:, None])[:, 0] * row.mask).sum()
    total = torch.zeros(PROBE.dim, dtype=torch.float64)
    for layer in PROBE.layers:
        for target in PROBE.targets:
            path = f"{'mlp' if target == 'down_proj' else 'self_attn'}.{target}"
            weight = weights[f"model.layers.{layer - 1}.{path}.weight"]
            (gradient,) = torch.autograd.grad(nll, weight, retain_graph=True)
            name = f"{layer}.{path}"
            g = PROBE.scaling * gradient @ PROBE.down_projection(name, weight.shape[1]).double().T
            total += g.flatten() @ streams.signs(PROBE.projection_key(name), 0, g.numel(), PROBE.dim).double()
    return total / total.norm() if row.mask.any() else total


@pytest.fixture(scope="module")
def expected(reference, inputs):
    own = reference()
    return [fingerprint(own, row) for row in inputs.rollouts]


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints(kind, world, expected):
    """1e-5 of their norm, 1; one row has no token that counts, and no gradient."""
    assert sum(not want.any() for want in expected) == 1
    for have, want in zip(world["fingerprints"][kind], expected, strict=True):
        assert have.dtype == torch.float32 and have.shape == (PROBE.dim,)
        assert (have.double() - want).norm() < 1e-5


def test_rollouts_have_different_fingerprints(expected):
    some = torch.stack([want for want in expected if want.any()])
    assert (some @ some.T - torch.eye(len(some))).max() < 0.95


def test_neighbours_and_ranks_do_not_matter(worlds):
    alone = worlds(1)["fingerprints"]["rows of one"]
    for size in (1, 2):
        for kind in KINDS:
            for have, want in zip(worlds(size)["fingerprints"][kind], alone, strict=True):
                assert (have - want).norm() < 1e-5


def test_taking_them_leaves_nothing_behind(world):
    """No gradient, no module in training mode, and two later training steps are bitwise those of a run without."""
    trained = world["fingerprints"]["trained"]
    assert trained["left"] == []
    ends = trained["ends"]
    assert ends["with"].keys() == ends["without"].keys()
    assert all(torch.equal(value, ends["without"][name]) for name, value in ends["with"].items())


@pytest.mark.parametrize("feed", FEEDS)
def test_adjacent_cosines(feed, world, reference, inputs):
    own = reference()
    for have, row in zip(world["fingerprints"][f"cosines {feed}"], inputs.rollouts, strict=True):
        embedded = own.model.model.embed_tokens(row.tokens)
        stream = [embedded, *own.residual_stream(row)]
        tokens = torch.nonzero(row.mask).flatten() + len(row.prompt)
        if len(tokens):
            cosines = [torch.cosine_similarity(a, b, dim=-1)[tokens].mean() for a, b in itertools.pairwise(stream)]
            assert len(cosines) == LAYERS and (have.double() - torch.stack(cosines)).abs().max() < 1e-5
        else:
            assert not have.any()


def test_a_layer_that_does_not_exist_is_refused(world):
    assert (
        world["fingerprints"]["out of range"] == f"grad_routing.detector.layers=4: the model has layers 1 to {LAYERS}"
    )
