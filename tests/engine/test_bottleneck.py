"""The engine's bottleneck coordinates are those of plain autograd, one rollout at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from tests.engine.rollouts import LAYERS
from tests.engine.scenarios_bottleneck import LORA, SVD, vectors
from tests.engine.scenarios_probe import FEEDS
from verl_grad_routing.bottleneck import Bottleneck, bases_of, cosines
from verl_grad_routing.directions import project

pytestmark = pytest.mark.timeout(600)

KINDS = [*FEEDS, "kept packed", "kept padded"]  # kept: no checkpointing, and packed inputs filled up to a bucket
ABLATED, BARE = (1, 0), (0, 0)


def modules(bottleneck: Bottleneck) -> dict[str, str]:
    """Name in the bottleneck -> name of the dense weight, in the model's order."""
    order = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    paths = [path for path in order if path.rpartition(".")[2] in bottleneck.targets]
    return {f"{n}.{path}": f"model.layers.{n - 1}.{path}.weight" for n in bottleneck.layers for path in paths}


def coordinates(own, row, bottleneck: Bottleneck, gate=ABLATED) -> torch.Tensor:
    """From the dense gradient G of the mean NLL with respect to every effective weight: diag(Bᵀ G Aᵀ), [M, r]."""
    weights = {name: value.detach().requires_grad_() for name, value in own.weights(gate).items()}
    output = functional_call(own.model, weights, (row.tokens[None],), {"use_cache": False})
    log_probs = output.logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
    nll = -(log_probs.gather(1, row.response[:, None])[:, 0] * row.mask).sum() / row.mask.sum().clamp(min=1)
    bases = bases_of(list(own.model.model.layers), bottleneck)
    rows = []
    for name, weight in modules(bottleneck).items():
        (G,) = torch.autograd.grad(nll, weights[weight], retain_graph=True)
        rows.append((bases[name].write_Or.double().T @ G @ bases[name].read_rI.double().T).diagonal())
    return torch.stack(rows)


@pytest.fixture(scope="module")
def expected(reference, inputs) -> torch.Tensor:
    own = reference()
    return torch.stack([coordinates(own, row, SVD) for row in inputs.rollouts])


def close(have: torch.Tensor, want: torch.Tensor) -> bool:
    """Within 1e-5 of the largest number."""
    return bool((have.double() - want).abs().max() < 1e-5 * want.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, world, expected):
    """One row has no token that counts, and no gradient."""
    have = world["bottleneck"][kind]
    assert have.dtype == torch.float32 and close(have.view_as(expected), expected)
    assert (have == 0).all(1).tolist() == (expected.flatten(1) == 0).all(1).tolist()
    assert sum((have == 0).all(1).tolist()) == 1


def test_every_rollouts_gradient_is_its_own(expected):
    some = torch.nn.functional.normalize(expected.flatten(1)[expected.flatten(1).any(1)], dim=1)
    assert (some @ some.T - torch.eye(len(some))).max() < 0.97


def test_at_the_base_weights(world, reference, inputs):
    own = reference()
    want = torch.stack([coordinates(own, row, SVD, BARE) for row in inputs.rollouts])
    assert close(world["bottleneck"]["reference"].view_as(want), want)


def test_of_a_drawn_adapter(world, reference, inputs):
    own = reference()
    want = torch.stack([coordinates(own, row, LORA) for row in inputs.rollouts])
    assert close(world["bottleneck"]["lora"].view_as(want), want)


@pytest.mark.parametrize("cosine", [False, True])
def test_scores(cosine, world, expected):
    have = world["bottleneck"][f"scores {cosine}"]
    want = (cosines if cosine else project)(expected, vectors(SVD))
    assert have.shape == (12, 2) and have.dtype == torch.float64 and close(have, want)


def test_neighbours_and_ranks_do_not_matter(worlds):
    alone = worlds(1)["bottleneck"]["rows of one"]
    for size in (1, 2):
        for kind in KINDS:
            assert close(worlds(size)["bottleneck"][kind], alone.double())


def test_bases_are_the_base_weights_own_on_every_rank(world, reference):
    own = reference()
    wanted = bases_of(list(own.model.model.layers), SVD)
    assert list(world["bottleneck"]["bases"]) == list(wanted) == list(modules(SVD))
    for name, (read, write) in world["bottleneck"]["bases"].items():
        torch.testing.assert_close(read, wanted[name].read_rI, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(write, wanted[name].write_Or, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, world["bottleneck"]["digests"][0]) for one in world["bottleneck"]["digests"])


def pooled_activations(own, row) -> torch.Tensor:
    """Mean over the counting tokens of ``A x``, both blocks on, [M, r]."""
    bases = bases_of(list(own.model.model.layers), SVD)
    heard, handles = {}, []
    for name, weight in modules(SVD).items():
        module = own.model.get_submodule(weight.removesuffix(".weight"))
        handles.append(module.register_forward_hook(lambda _m, x, _y, name=name: heard.update({name: x[0][0]})))
    functional_call(own.model, own.weights((1, 1)), (row.tokens[None],), {"use_cache": False})
    for handle in handles:
        handle.remove()
    tokens = torch.nonzero(row.mask).flatten() + len(row.prompt)
    if not len(tokens):
        return torch.zeros(len(bases), SVD.rank, dtype=torch.float64)
    return torch.stack([(x[tokens] @ bases[name].read_rI.double().T).mean(0) for name, x in heard.items()])


@pytest.mark.parametrize("feed", FEEDS)
def test_activations(feed, world, reference, inputs):
    own = reference()
    want = torch.stack([pooled_activations(own, row) for row in inputs.rollouts])
    assert close(torch.stack(world["bottleneck"][f"activations {feed}"]).view_as(want), want)
    assert close(torch.stack(world["bottleneck"]["activation scores"]), project(want, vectors(SVD)))


@pytest.mark.parametrize("size", [1, 2], ids=["one rank", "two ranks"])
def test_memory_does_not_grow_with_the_number_of_rollouts(size, worlds, inputs):
    """A rollout more costs its columns and two scores, less than 5% of what it costs while its micro-batch runs."""
    peaks, more = worlds(size)["bottleneck"]["peaks"], 3 * len(inputs.rollouts) / size
    assert 0 < (peaks[4] - peaks[1]) / more < 0.05 * peaks[1] / 3


def test_taking_them_leaves_nothing_behind(world):
    """No gradient, hook or module in training mode, and a later step is bitwise that of a run without."""
    assert world["bottleneck"]["hooks left"] == 0
    trained = world["bottleneck"]["trained"]
    assert trained["left"] == []
    ends = trained["ends"]
    assert ends["with"].keys() == ends["without"].keys()
    assert all(torch.equal(value, ends["without"][name]) for name, value in ends["with"].items())


def test_a_rank_that_a_layer_has_not_is_refused(world):
    fix = "2.self_attn.k_proj is 32 x 64; give at most 32, or leave it out"
    assert world["bottleneck"]["out of range"] == f"grad_routing.detector.rank=33: {fix}"
    assert LAYERS == 3
