"""How the blocks start: matched, separated, and the same whatever the order, dtype or number of processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import (
    INITIALISATIONS,
    add_blocks,
    initialisation_report,
    initialise_blocks,
    register_initialisation,
)
from verl_grad_routing.routing.initialise import ROW_NORM, module_generator, right_singular_vectors


def model(order: str = "ab", **overrides):
    layers = {name: nn.Linear(24, 10) for name in order}
    settings = {"deployed_rank": 3, "quarantine_rank": 5, "scaling": 1.0, "target_modules": ["a", "b"], "seed": 4}
    return add_blocks(nn.ModuleDict(layers), **(settings | overrides))[0]


def weights(adapted) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in adapted.named_parameters() if "lora_" in name}


def test_blocks_are_jointly_orthogonal_and_equal_in_scale():
    report = initialisation_report(model())
    assert report.modules == 2 and report.max_abs_B == 0.0 and report.max_cross_cosine < 1e-7
    for low, high in (report.deployed_row_norms, report.quarantine_row_norms):
        assert low == pytest.approx(ROW_NORM, rel=1e-6) and high == pytest.approx(ROW_NORM, rel=1e-6)
    values = INITIALISATIONS["random_orthogonal"](24, 10, 3, 5, torch.Generator().manual_seed(0))
    rows = torch.cat((values.A_d, values.A_q))
    assert (rows @ rows.t() - torch.eye(8, dtype=torch.float64) / 3).abs().max() < 1e-14


def test_row_norms_match_pefts_default_on_average():
    A = torch.empty(64, 4096)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    assert A.norm(dim=1).square().mean().sqrt().item() == pytest.approx(ROW_NORM, rel=0.01)


def test_values_depend_on_name_and_seed_alone():
    first, reordered = weights(model("ab")), weights(model("ba"))
    assert all(torch.equal(first[name], reordered[name]) for name in first)
    other_seed = weights(model(seed=5))
    name = "base_model.model.a.lora_A.default.weight"
    assert not torch.equal(first[name], other_seed[name])
    assert not torch.equal(first[name], first[name.replace(".a.", ".b.")])


def test_values_do_not_depend_on_dtype_or_the_global_generator():
    torch.manual_seed(1)
    single = weights(model())
    torch.manual_seed(2)
    adapted = add_blocks(
        nn.ModuleDict({"a": nn.Linear(24, 10), "b": nn.Linear(24, 10)}).bfloat16(),
        deployed_rank=3,
        quarantine_rank=5,
        scaling=1.0,
        target_modules=["a", "b"],
        seed=4,
        autocast_adapter_dtype=False,
    )[0]
    for name, value in weights(adapted).items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, single[name].bfloat16())


def test_wrappers_do_not_change_the_draw():
    plain = torch.randn(3, generator=module_generator("layers.0.q_proj", 1))
    for name in (
        "base_model.model.layers.0.q_proj",
        "_fsdp_wrapped_module.base_model.model.layers.0._checkpoint_wrapped_module.q_proj",
        "_orig_mod.layers.0.q_proj",
    ):
        assert torch.equal(plain, torch.randn(3, generator=module_generator(name, 1)))
    assert not torch.equal(plain, torch.randn(3, generator=module_generator("layers.1.q_proj", 1)))


def test_meta_parameters_wait_and_get_the_same_values():
    with torch.device("meta"):
        skeleton = nn.ModuleDict({"a": nn.Linear(24, 10), "b": nn.Linear(24, 10)})
    adapted, _ = add_blocks(
        skeleton, deployed_rank=3, quarantine_rank=5, scaling=1.0, target_modules=["a", "b"], seed=4
    )
    assert all(p.is_meta for p in adapted.parameters())
    adapted.to_empty(device="cpu")
    assert initialise_blocks(adapted, "random_orthogonal", 4) == 2
    expected = weights(model())
    assert all(torch.equal(value, expected[name]) for name, value in weights(adapted).items())


def test_kaiming_rows_have_pefts_bound():
    values = INITIALISATIONS["kaiming_uniform"](24, 10, 300, 300, torch.Generator().manual_seed(0))
    assert values.A_d.abs().max() <= 24**-0.5 and not values.B_d.any() and not values.B_q.any()
    assert values.A_q.var().item() == pytest.approx(1 / (3 * 24), rel=0.05)


def test_more_rows_than_inputs_are_refused():
    with pytest.raises(UserError, match="at most 24"):
        model(deployed_rank=20)


def test_unknown_and_duplicate_names_are_refused():
    with pytest.raises(UserError, match="random_orthogonal"):
        model(init="orthogonal")
    with pytest.raises(UserError, match="already registered"):
        register_initialisation("random_orthogonal")(lambda *_: None)


def test_a_model_without_blocks_is_refused():
    for function in (initialisation_report, lambda m: initialise_blocks(m, "random_orthogonal", 0)):
        with pytest.raises(UserError, match="no module with the adapters"):
            function(nn.Linear(2, 2))


def spectrum(d_out: int, d_in: int, values, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with these singular values, float64, and its right singular vectors as rows."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64))[0]
        for size in (d_out, d_in)
    )
    return left * torch.tensor(values, dtype=torch.float64) @ right.t(), right.t()


class TestPissaSplit:
    GENERATOR = torch.Generator()

    def test_by_hand(self):
        # W = diag(1, 5, 2, 4): right singular vectors in order are e1, e3, e2, e0
        weight = torch.diag(torch.tensor([1.0, 5, 2, 4], dtype=torch.float64))
        values = INITIALISATIONS["pissa_split"](4, 4, 2, 2, self.GENERATOR, weight)
        unit = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(values.A_d, unit[[1, 2]] * ROW_NORM, atol=1e-15, rtol=0)
        torch.testing.assert_close(values.A_q, unit[[3, 0]] * ROW_NORM, atol=1e-15, rtol=0)
        assert values.B_d.shape == values.B_q.shape == (4, 2) and not values.B_d.any() and not values.B_q.any()

    @pytest.mark.parametrize("shape", [(10, 24), (24, 10), (12, 12)])
    def test_rows_are_the_singular_vectors_of_lapack(self, shape):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rows = right_singular_vectors(weight, 8)
        expected = torch.linalg.svd(weight)[2][:8]
        cosines = (rows * expected).sum(1)
        assert (cosines.abs() - 1).abs().max() < 1e-12
        assert (rows @ rows.t() - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-14
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()
        # the sign of the weight does not matter, and its scale neither
        assert torch.allclose(right_singular_vectors(-1e-6 * weight, 8), rows, atol=1e-12)

    def test_unequal_ranks_take_every_second_vector(self):
        weight, right = spectrum(16, 20, [2.0**-k for k in range(12)])
        values = INITIALISATIONS["pissa_split"](20, 16, 5, 2, self.GENERATOR, weight)
        for block, numbers in ((values.A_d, [0, 2, 4, 6, 8]), (values.A_q, [1, 3])):
            assert ((block @ right[numbers].t()).diagonal().abs() - ROW_NORM).abs().max() < 1e-9

    def test_in_a_model_blocks_are_orthogonal_and_scaled_as_random_orthogonal(self):
        torch.manual_seed(0)
        layers = nn.ModuleDict({"a": nn.Linear(24, 10), "b": nn.Linear(24, 10)})
        before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        x = torch.randn(4, 24)
        plain = layers["a"](x)
        settings = {"deployed_rank": 3, "quarantine_rank": 4, "scaling": 2.0, "target_modules": ["a", "b"]}
        adapted, _ = add_blocks(layers, init="pissa_split", **settings)
        report, random = initialisation_report(adapted), initialisation_report(model())
        assert report.modules == 2 and report.max_abs_B == 0 and report.max_cross_cosine < 1e-6
        for ours, other in zip(report[1:3], random[1:3], strict=True):
            assert ours == pytest.approx(other, rel=1e-6)
        assert torch.equal(adapted.base_model.model["a"](x), plain)  # B = 0: the model is the base model
        found = weights(adapted)
        for name, weight in before.items():
            rows = (right_singular_vectors(weight, 8) * ROW_NORM).float()
            assert torch.equal(found[f"base_model.model.{name}.lora_A.default.weight"], rows[[0, 2, 4]])
            assert torch.equal(found[f"base_model.model.{name}.lora_A.quarantine.weight"], rows[[1, 3, 5, 7]])

    def test_meta_weights_wait(self):
        with torch.device("meta"):
            skeleton = nn.ModuleDict({"a": nn.Linear(24, 10)})
        settings = {"deployed_rank": 3, "quarantine_rank": 4, "scaling": 1.0, "target_modules": ["a"]}
        adapted, _ = add_blocks(skeleton, init="pissa_split", **settings)
        assert all(p.is_meta for p in adapted.parameters())
        adapted.to_empty(device="cpu")
        torch.nn.init.normal_(adapted.base_model.model["a"].base_layer.weight)
        assert initialise_blocks(adapted, "pissa_split", 0) == 1
        assert initialisation_report(adapted).max_cross_cosine < 1e-6

    def test_refusals(self):
        pissa = INITIALISATIONS["pissa_split"]
        weight = torch.randn(10, 24, dtype=torch.float64)
        with pytest.raises(UserError, match=r"takes 12 singular vectors and a layer has 10"):
            pissa(24, 10, 3, 6, self.GENERATOR, weight)
        low_rank, _ = spectrum(10, 24, [3.0, 2.0, 1.0])
        with pytest.raises(UserError, match=r"base weight's rank=3: 4 singular vectors"):
            pissa(24, 10, 2, 2, self.GENERATOR, low_rank)
        for bad in (torch.zeros(10, 24), torch.full((10, 24), math.nan)):
            with pytest.raises(UserError, match="base weight"):
                pissa(24, 10, 2, 2, self.GENERATOR, bad)
