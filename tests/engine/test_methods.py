"""Gradient regularisation and TDGA's projection on a real engine, one and two ranks, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.engine.reference import all_moved, block_of, relative_error, same
from tests.engine.rollouts import RICH
from tests.engine.scenarios_methods import CLIP, EPSILON, GAMMA, directions

pytestmark = pytest.mark.timeout(600)


def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    assert norm > CLIP, "this case does not clip"
    return {name: g.double() * (CLIP / norm) for name, g in gradients.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def projection(name: str, inputs) -> Tensor:
    """U diag(alpha) Uᵀ of the module that ``name`` belongs to."""
    module = name.removeprefix("base_model.model.").split(".lora_")[0]
    subspace = directions(inputs.adapters["equal"], identity=False).subspaces[module]
    vectors, values = subspace.vectors_OK.double(), subspace.values_K.double()
    return vectors @ torch.diag(values / values.sum()) @ vectors.T


class TestRegularizeGradient:
    def test_it_is_the_finite_difference_of_the_routed_gradients(self, world, reference, inputs):
        first = clipped(reference().gradients(inputs.rollouts, RICH))
        moved = {name: value.double() + EPSILON * first[name] for name, value in inputs.adapters["equal"].items()}
        second = clipped(reference().load(moved).gradients(inputs.rollouts, RICH))
        expected = {name: g + GAMMA / EPSILON * (second[name] - g) for name, g in first.items()}
        found = world["methods"]["regularize"]["gradients"]
        assert relative_error(found, expected) < 1e-4
        assert relative_error(found, first) > 0.01  # the second gradient matters

    def test_gamma_0_changes_no_bit(self, world):
        for when in ("first", "second"):
            assert equal(world["methods"]["none"][when], world["methods"]["gamma 0"][when])
            assert not equal(world["methods"]["none"][when], world["methods"]["regularize"][when])

    def test_a_block_without_mass_stays_bitwise_where_it_is(self, world):
        found = world["methods"]["regularize"]
        assert same(found["first"], found["second"], "deployed")
        assert all_moved(found["first"], found["second"], "quarantine")

    def test_metrics(self, world):
        metrics = world["methods"]["regularize"]["metrics"]
        assert metrics["routing/regularize_gradient/grad_norm"] > CLIP
        assert metrics["routing/regularize_gradient/grad_norm_uphill"] > 0


class TestProjectUpdate:
    def test_gradients_of_the_output_side_are_projected(self, world, inputs):
        plain, found = (world["methods"][name]["gradients"] for name in ("none", "project"))
        expected = {
            name: projection(name, inputs) @ g.double() if ".lora_B." in name else g.double()
            for name, g in plain.items()
        }
        assert relative_error(found, expected) < 1e-5
        assert all(torch.equal(found[name], g) for name, g in plain.items() if ".lora_A." in name)

    def test_the_projected_update_is_the_projection_of_the_plain_one(self, world, inputs):
        before = inputs.adapters["equal"]
        plain, found = (world["methods"][name]["first"] for name in ("none", "project update"))
        for name, start in before.items():
            update = plain[name].double() - start.double()
            if ".lora_B." in name:
                update = projection(name, inputs) @ update
            error = (found[name].double() - start.double() - update).abs().max()
            assert error < 1e-5 * max(1e-3, float(update.abs().max())) + 1e-7, name

    def test_frozen_inputs_do_not_move(self, world, inputs):
        found = world["methods"]["inputs frozen"]["second"]
        for name, start in inputs.adapters["equal"].items():
            assert torch.equal(found[name], start) is (".lora_A." in name)

    @pytest.mark.parametrize("name", ["identity", "identity update"])
    def test_the_identity_changes_no_bit(self, name: str, world):
        for when in ("first", "second"):
            assert equal(world["methods"]["none"][when], world["methods"][name][when])

    @pytest.mark.parametrize("name", ["project", "project update"])
    def test_a_block_without_mass_stays_bitwise_where_it_is(self, name: str, world):
        found = world["methods"][name]
        assert same(found["first"], found["second"], "deployed")
        assert any(
            not torch.equal(value, found["second"][key])
            for key, value in found["first"].items()
            if block_of(key) == "quarantine"
        )

    def test_metrics(self, world):
        kept = world["methods"]["project"]["metrics"]["routing/project_update/share_kept"]
        inside = world["methods"]["project"]["metrics"]["routing/project_update/share_inside"]
        assert 0 < kept < inside < 1
        whole = world["methods"]["identity"]["metrics"]
        assert (
            whole["routing/project_update/share_kept"]
            == pytest.approx(1)
            == whole["routing/project_update/share_inside"]
        )


def test_two_ranks_agree_with_one(worlds):
    for name in ("regularize", "project"):
        one, two = (worlds(size)["methods"][name]["gradients"] for size in (1, 2))
        assert relative_error(two, {key: value.double() for key, value in one.items()}) < 1e-4
