"""Routes of tokens in verl's FSDP2 engine, on one and two ranks, against a reference with parameters per position."""

from __future__ import annotations

import pytest
import torch

from tests.engine import dense_reference
from tests.engine import reference as tables
from tests.engine.reference import all_moved, relative_error, same
from tests.engine.rollouts import KEEP, LAYERS, PLAIN, RICH, with_token_routes, with_token_weights
from tests.engine.test_dense import error
from tests.engine.token_reference import TokenDenseReference, TokenReference, routes_by_position

pytestmark = pytest.mark.timeout(600)

CASES = {
    "packed": (PLAIN, tables.DEFAULT, False),
    "packed rows of one": (PLAIN, tables.DEFAULT, False),
    "padded": (PLAIN, tables.DEFAULT, False),
    "padded rows of two": (RICH, tables.DEFAULT, False),
    "dynamic": (RICH, tables.DEFAULT, False),
    "weights": (PLAIN, tables.DEFAULT, True),
    "strict": (PLAIN, tables.STRICT, False),
    "activation masking": (PLAIN, tables.ACTIVATION_MASKING, False),
    "checkpointed": (PLAIN, tables.DEFAULT, False),
    "checkpointed padded": (RICH, tables.DEFAULT, False),
    "buckets": (PLAIN, tables.DEFAULT, False),
}
DENSE_CASES = {
    "packed": (PLAIN, dense_reference.PARAMETER_MASKING),
    "padded": (RICH, dense_reference.PARAMETER_MASKING),
    "checkpointed": (PLAIN, dense_reference.PARAMETER_MASKING),
    "cloud": (PLAIN, dense_reference.CLOUD),
}


@pytest.fixture(scope="module")
def own(inputs):
    return TokenReference(inputs.model_dir, inputs.adapters["equal"])


@pytest.fixture(scope="module")
def expected(own, inputs):
    """The reference's gradients of a case; each is computed once."""
    done = {}

    def of(loss, table, weighted=False):
        key = (loss, id(table), weighted)
        if key not in done:
            done[key] = own.gradients(with_token_routes(inputs.rollouts), loss, table, weighted)
        return done[key]

    return of


@pytest.fixture(scope="module")
def dense(inputs):
    return TokenDenseReference(inputs.model_dir)


def double(values):
    return {name: value.double() for name, value in values.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_tokens_route_holds_where_it_is_predicted(case, world, expected):
    assert relative_error(world["token_gradients"][case], expected(*CASES[case])) < 1e-5


@pytest.mark.parametrize("case", DENSE_CASES)
def test_routes_of_tokens_with_dense_blocks(case, world, dense, inputs):
    loss, table = DENSE_CASES[case]
    wanted = dense.gradients(with_token_routes(inputs.rollouts), loss, table)
    assert error(world["token_dense_gradients"][case], wanted) < 1e-5


WEIGHTS = {  # case -> (table, whether tokens have routes of their own)
    "weights": (dense_reference.CLOUD, False),
    "weights padded": (dense_reference.CLOUD, False),
    "weights checkpointed": (dense_reference.CLOUD, False),
    "weights and routes": (dense_reference.CLOUD, True),
    "weights off target": (dense_reference.CLOUD_OFF_TARGET, True),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_tokens_scale_what_comes_back_to_units(case, world, dense, inputs):
    table, by_token = WEIGHTS[case]
    rows = with_token_routes(inputs.rollouts) if by_token else inputs.rollouts
    wanted = dense.gradients(with_token_weights(rows), PLAIN, table)
    assert error(world["token_dense_gradients"][case], wanted) < 1e-5
    flat = dense.gradients(rows, PLAIN, table)
    assert error(flat, wanted) > 1e-2  # what the weights are about


def test_weights_of_zero_change_nothing_bit_for_bit(world):
    found = world["token_dense_gradients"]
    assert all(torch.equal(value, found["weights of zero"][name]) for name, value in found["no weights"].items())


def test_two_ranks_are_one_rank(worlds):
    for scenario in ("token_gradients", "token_dense_gradients"):
        one, two = worlds(1)[scenario], worlds(2)[scenario]
        for name in one:
            assert error(two[name], double(one[name])) < 1e-5


def test_without_routes_of_tokens_the_reference_is_the_plain_one(own, reference, inputs):
    """Parameters per position, all with their row's route, are parameters per row."""
    assert relative_error(own.gradients(inputs.rollouts, RICH), reference().gradients(inputs.rollouts, RICH)) < 1e-9


def test_the_reference_tells_positions_apart(own, expected, inputs):
    """One position too late, other routes elsewhere or the row's route everywhere are far from the right gradient."""
    from dataclasses import replace

    rows = with_token_routes(inputs.rollouts)
    right = expected(PLAIN, tables.DEFAULT)
    late = [replace(row, token_routes=(row.route, *row.token_routes[:-1])) for row in rows]
    elsewhere = [replace(row, route=(row.route + 1) % 3) for row in rows]
    flat = [replace(row, token_routes=None) for row in rows]
    for wrong in (late, elsewhere, flat):
        assert relative_error(own.gradients(wrong), right) > 0.05


class TestSteps:
    @pytest.mark.parametrize("feed", ["packed", "padded"])
    @pytest.mark.parametrize("kind", ["absorb", "rollouts"])
    def test_one_route_for_all_tokens_is_that_of_the_rollout_bit_for_bit(self, kind, feed, world):
        plain, by_token = (world["token_steps"][f"{name} {feed}"] for name in (kind, f"{kind} by token"))
        assert plain.keys() == by_token.keys()
        assert all(torch.equal(value, by_token[name]) for name, value in plain.items())

    def test_masses_are_tokens_that_train_a_block(self, world, inputs):
        mass = dict.fromkeys(("deployed", "quarantine"), 0.0)
        for row in with_token_routes(inputs.rollouts):
            for token, counts in enumerate(row.mask.tolist()):
                update = tables.DEFAULT[row.token_routes[token]][1]
                for name, share in zip(mass, update, strict=True):
                    mass[name] += counts * share
        assert 0 < mass["deployed"] != mass["quarantine"] > 0
        for name, value in mass.items():
            assert world["token_steps"]["mass"][f"routing/mass_{name}"] == value

    def test_a_batch_that_routes_every_token_leaves_the_deployed_block_bitwise(self, world):
        before, metrics, after = world["token_steps"]["all routed"]
        assert same(before, after, "deployed") and all_moved(before, after, "quarantine")
        assert metrics["routing/mass_deployed"] == 0

    @pytest.mark.parametrize("feed", ["log_probs", "log_probs padded"])
    def test_a_kept_token_is_predicted_without_the_quarantine(self, feed, world, own, inputs):
        found, rows = world["token_steps"], with_token_routes(inputs.rollouts)
        gaps = []
        for row, have, plain in zip(rows, found[feed], found["plain"], strict=True):
            assert (have.double() - own.token_log_probs(row)).abs().max() < 2e-5
            gaps.append(float((have - plain).abs().max()))
            if KEEP not in routes_by_position(row):
                assert gaps[-1] < 2e-5
        assert max(gaps) > 0.1

    @pytest.mark.parametrize("feed", ["packed", "padded"])
    def test_rollouts_with_kept_tokens_bring_their_own_old_log_probs(self, feed, world):
        found = world["token_steps"]
        given = double(found[f"given old {feed}"])
        assert relative_error(found[f"current old {feed}"], given) < 5e-6
        assert relative_error(found["wrong old"], double(found["given old packed"])) > 0.01


def vectors():
    return torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(6), dtype=torch.float64)[0]


@pytest.mark.parametrize("feed", ["packed", "padded", "padded rows of two", "dynamic"])
@pytest.mark.parametrize("kind", ["projection", "cosine"])
def test_tokens_are_scored_at_their_own_position(kind, feed, world, reference, inputs):
    found, plain = world["token_scores"][f"{kind} {feed}"], reference()
    for row, have, pooled in zip(inputs.rollouts, found["tokens"], found["rollouts"], strict=True):
        hidden_LTd = torch.stack(plain.residual_stream(row))[[LAYERS - 1, 0]]
        score_LT = torch.einsum("ltd,ld->lt", hidden_LTd, vectors())
        if kind == "cosine":
            score_LT = score_LT / hidden_LTd.norm(dim=-1) / vectors().norm(dim=-1)[:, None]
        assert (have.double() - score_LT.mean(0)[len(row.prompt) :]).abs().max() < 1e-3
        if kind == "projection" and row.mask.any():  # the rollout's score is the mean over the tokens that count
            assert float(have[row.mask != 0].mean()) == pytest.approx(float(pooled[0]), abs=1e-4)


def test_the_rollouts_scores_are_the_same_bits_with_and_without_those_of_tokens(world):
    found = world["token_scores"]
    assert "found_tokens" not in found["without"]["columns"]
    assert all(map(torch.equal, found["projection packed"]["rollouts"], found["without"]["rollouts"]))
