"""Bases from pairs: against dense float64 references and cases worked by hand; the file; what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from verl_grad_routing.directions.inputs import input_differences
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import (
    INITIALISATIONS,
    Contrast,
    add_blocks,
    initialisation_report,
    load_contrast,
    save_contrast,
)
from verl_grad_routing.routing.bases import ROW_NORM, BlockWeights

NAMES = ("corda", "scorda", "scorda_rev")
GENERATOR = torch.Generator()
D_IN, D_OUT = 20, 14


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name: str, r_d: int, r_q: int, weight: Tensor, difference_PI: Tensor) -> BlockWeights:
    d_out, d_in = weight.shape
    return INITIALISATIONS[name](d_in, d_out, r_d, r_q, GENERATOR, weight, difference_PI)


def gram_schmidt(rows: Tensor) -> Tensor:
    """One row after the other, as on paper."""
    done: list[Tensor] = []
    for row in rows:
        for other in done:
            row = row - (row @ other) * other
        done.append(row / row.norm())
    return torch.stack(done)


def same_up_to_sign(found: Tensor, expected: Tensor) -> bool:
    return bool(((found * expected).sum(1).abs() - 1).abs().max() < 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [(3, 3), (4, 2), (1, 1)])
def test_blocks_are_orthogonal_and_every_row_has_the_same_norm(name, ranks):
    values = build(name, *ranks, drawn(D_OUT, D_IN), drawn(5, D_IN, seed=1))
    rows = torch.cat(values[:2])
    assert (values.A_d.shape, values.A_q.shape) == ((ranks[0], D_IN), (ranks[1], D_IN))
    assert (rows @ rows.t() - torch.eye(sum(ranks), dtype=torch.float64) * ROW_NORM**2).abs().max() < 1e-13
    assert not values.B_d.any() and not values.B_q.any()


class TestCorda:
    def test_the_definition_in_dense_matrices(self):
        # C = DᵀD/P + a I, a = 1e-3 tr/d_in; W C^½ = U S Q; rows Q C^½ (wassname/vGROUT_pub@c067218, corda_basis)
        weight, D = drawn(D_OUT, D_IN), drawn(5, D_IN, seed=1)
        raw = D.t() @ D / 5
        values, vectors = torch.linalg.eigh(raw + 1e-3 * raw.trace() / D_IN * torch.eye(D_IN, dtype=torch.float64))
        root = vectors @ values.sqrt().diag() @ vectors.t()
        _, _, Q = torch.linalg.svd(weight @ root)
        expected = gram_schmidt(Q[:6] @ root)
        found = build("corda", 3, 3, weight, D)
        assert same_up_to_sign(found.A_d / ROW_NORM, expected[0::2])
        assert same_up_to_sign(found.A_q / ROW_NORM, expected[1::2])

    def test_by_hand(self):
        # W = I and pairs that differ along axis 3 four times as much as along axis 1: first axis 3, then axis 1
        D = torch.zeros(2, 5, dtype=torch.float64)
        D[0, 3], D[1, 1] = 4.0, 1.0
        found = build("corda", 1, 1, torch.eye(5, dtype=torch.float64), D)
        assert found.A_d.abs().argmax() == 3 and float(found.A_d.abs().max()) == pytest.approx(ROW_NORM)
        assert found.A_q.abs().argmax() == 1 and float(found.A_q.abs().max()) == pytest.approx(ROW_NORM)

    def test_pairs_that_differ_everywhere_alike_give_pissa(self):
        weight = drawn(D_OUT, D_IN)
        frame, _ = torch.linalg.qr(drawn(D_IN, D_IN, seed=2))
        found = build("corda", 3, 3, weight, frame * 7.0)
        plain = INITIALISATIONS["pissa_split"](D_IN, D_OUT, 3, 3, GENERATOR, weight)
        for ours, other in zip(found[:2], plain[:2], strict=True):
            assert same_up_to_sign(ours / ROW_NORM, other / ROW_NORM)

    def test_the_scale_of_the_pairs_does_not_matter(self):
        weight, D = drawn(D_OUT, D_IN), drawn(5, D_IN, seed=1)
        small, large = (build("corda", 3, 3, weight, D * scale) for scale in (1e-6, 1e6))
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(small, large, strict=True))


class TestScorda:
    WEIGHT, D = drawn(D_OUT, D_IN), drawn(5, D_IN, seed=1) + 0.5

    def test_the_quarantine_reads_the_mean_difference_with_its_sign(self):
        found = build("scorda", 3, 3, self.WEIGHT, self.D)
        seed = self.D.mean(0) / self.D.mean(0).norm()
        assert float(found.A_q[0] @ seed) == pytest.approx(ROW_NORM, abs=1e-12)
        assert (found.A_d @ seed).abs().max() < 1e-13 and (found.A_q[1:] @ seed).abs().max() < 1e-13
        turned = build("scorda", 3, 3, self.WEIGHT, -self.D)
        assert (turned.A_q[0] + found.A_q[0]).abs().max() < 1e-12

    def test_the_rest_are_singular_vectors_without_it_in_turn(self):
        seed = self.D.mean(0)
        vectors = torch.linalg.svd(self.WEIGHT)[2]
        expected = gram_schmidt(torch.cat([seed[None], vectors[:5]]))[1:]
        found = build("scorda", 3, 3, self.WEIGHT, self.D)
        assert same_up_to_sign(found.A_d / ROW_NORM, expected[0::2])
        assert same_up_to_sign(found.A_q[1:] / ROW_NORM, expected[1:4:2])

    def test_reversed_is_the_same_with_the_blocks_exchanged(self):
        plain, reversed_ = (build(name, 3, 3, self.WEIGHT, self.D) for name in ("scorda", "scorda_rev"))
        assert torch.equal(plain.A_d, reversed_.A_q) and torch.equal(plain.A_q, reversed_.A_d)


def layers(**overrides) -> tuple[nn.Module, nn.ModuleDict]:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"a": nn.Linear(24, 10), "b": nn.Linear(24, 10)})
    changes = Contrast({name: drawn(4, 24, seed=i).float() for i, name in enumerate("ab")}, {"model": "m"})
    settings = {"deployed_rank": 3, "quarantine_rank": 3, "scaling": 2.0, "target_modules": ["a", "b"]}
    return add_blocks(plain, **{**settings, "contrast": changes, **overrides})[0], plain


@pytest.mark.parametrize("name", NAMES)
def test_in_a_model_the_start_is_the_base_model_and_scaled_as_every_other_basis(name):
    adapted, plain = layers(init=name)
    report, random = initialisation_report(adapted), initialisation_report(layers(init="pissa_split", contrast=None)[0])
    assert report.max_abs_B == 0 and report.max_cross_cosine < 1e-6
    for ours, other in zip(report[1:3], random[1:3], strict=True):
        assert ours == pytest.approx(other, rel=1e-6)
    assert "2 modules, row norms deployed 0.5774 to 0.5774, quarantine 0.5774 to 0.5774" in str(report)
    x = torch.randn(4, 24)
    assert torch.equal(adapted.base_model.model["a"](x), nn.functional.linear(x, *plain["a"].base_layer.parameters()))


class TestRefusals:
    def test_missing_and_superfluous(self):
        with pytest.raises(UserError, match=r"contrast=None: init scorda reads pairs"):
            layers(init="scorda", contrast=None)
        with pytest.raises(UserError, match="two bases on one block"):
            layers(init="pissa_split")
        with pytest.raises(UserError, match="one basis; give one name"):
            layers(init=["corda", "scorda"])

    def test_of_another_model(self):
        with pytest.raises(UserError, match="no layer b: made on another model"):
            layers(init="corda", contrast=Contrast({"a": torch.ones(2, 24)}))
        with pytest.raises(UserError, match="a has 24 inputs and its differences 23"):
            layers(init="corda", contrast=Contrast({"a": torch.ones(2, 23)}))

    def test_pairs_that_say_nothing_name_the_layer(self):
        nothing = {"a": torch.ones(2, 24), "b": torch.zeros(2, 24)}
        with pytest.raises(UserError, match=r"pairs \(b\)='difference 0'"):
            layers(init="corda", contrast=Contrast(nothing))
        opposed = {"a": torch.ones(2, 24), "b": torch.ones(2, 24) * torch.tensor([[1.0], [-1.0]])}
        with pytest.raises(UserError, match=r"pairs \(b\)='mean difference 0'"):
            layers(init="scorda", contrast=Contrast(opposed))

    @pytest.mark.parametrize("name", NAMES)
    def test_too_many_rows(self, name):
        with pytest.raises(UserError, match="lower ranks"):
            build(name, 8, 8, drawn(D_OUT, D_IN), drawn(5, D_IN))

    def test_a_seed_that_the_rest_already_spans(self):
        weight = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])).double()
        with pytest.raises(UserError, match="span of those before it"):
            build("scorda", 1, 2, weight, torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]] * 2).double())


class TestFile:
    def test_round_trip(self, tmp_path: Path):
        made = Contrast({"x": drawn(3, 4).float(), "y": drawn(3, 6).float()}, {"model_hash": "abc"})
        save_contrast(made, tmp_path / "deep" / "contrast.safetensors")
        back = load_contrast(tmp_path / "deep" / "contrast.safetensors")
        assert back.origin == made.origin and back.differences.keys() == made.differences.keys()
        assert all(torch.equal(value, back.differences[name]) for name, value in made.differences.items())

    def test_refusals(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"no such file; make one: vgr contrast MODEL"):
            load_contrast(tmp_path / "none.safetensors")
        (tmp_path / "text.safetensors").write_text("hello")
        with pytest.raises(UserError, match="not a safetensors file"):
            load_contrast(tmp_path / "text.safetensors")
        save_file({"x": torch.ones(2, 2)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match="not a contrast"):
            load_contrast(tmp_path / "other.safetensors")
        with pytest.raises(UserError, match="finite"):
            Contrast({"x": torch.full((2, 2), math.nan)})


class TestInputs:
    """Pooled inputs of a small network against what its parts compute when called by hand."""

    @pytest.fixture
    def network(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.embed, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)
                self.expert = nn.Linear(4, 4)

            def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
                embedded = self.embed(input_ids)
                if int(input_ids[0, -1]) == 8:
                    self.expert(embedded)
                return self.second(self.first(embedded).relu())

        return Net()

    TEXTS = (([1, 2, 3], [4, 5], [6]), ([7], [1, 1, 8], [2, 2]))

    def test_means_over_the_completion(self, network):
        found = input_differences(network, {"first": network.first, "second": network.second}, self.TEXTS)
        for number, (_, unwanted, wanted) in enumerate(self.TEXTS):
            embedded = [network.embed(torch.tensor(side)) for side in (unwanted, wanted)]
            hidden = [network.first(x).relu() for x in embedded]
            for name, sides in (("first", embedded), ("second", hidden)):
                expected = sides[0].double().mean(0) - sides[1].double().mean(0)
                assert (found[name][number] - expected).abs().max() < 1e-6

    def test_what_some_text_does_not_reach_is_left_out(self, network):
        chosen = {"first": network.first, "expert": network.expert}
        assert set(input_differences(network, chosen, self.TEXTS)) == {"first"}

    def test_what_is_not_finite_is_named(self, network):
        with torch.no_grad():
            network.embed.weight[5] = math.inf
        with pytest.raises(UserError, match=r"pair number 1=.*first"):
            input_differences(network, {"first": network.first}, self.TEXTS)
