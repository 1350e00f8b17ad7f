"""Subspaces of weight changes: projection, decomposition, drift, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from verl_grad_routing.errors import UserError
from verl_grad_routing.subspaces import (
    Basis,
    Subspace,
    alphas,
    basis_of_change,
    canonical_overlap,
    drift,
    load_basis,
    project,
    save_basis,
)
from verl_grad_routing.subspaces.basis import model_hash
from verl_grad_routing.subspaces.change import leading


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


def basis(seed: int = 0, rank: int = 3) -> Basis:
    values = torch.arange(rank, 0, -1.0)
    return Basis({name: Subspace(orthonormal(8, rank, seed).float(), values) for name in ("one", "two")}, {"a": "b"})


class TestProjection:
    def test_worked_case(self):
        # from the definition in arXiv 2605.25189: U = I (3 x 2), alpha = (.75, .25)
        gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        found = project(gradient, torch.eye(3)[:, :2], torch.tensor([0.75, 0.25]))
        assert torch.equal(found, torch.tensor([[0.75, 1.5], [0.75, 1.0], [0.0, 0.0]]))

    def test_weights_are_the_shares_of_the_singular_values(self):
        values = torch.tensor([3.0, 1.0])
        assert alphas(values, "singular").tolist() == [0.75, 0.25]
        assert alphas(values, "ones").tolist() == [1.0, 1.0]

    def test_one_direction_is_a_projector_and_more_are_not(self):
        gradient = torch.randn(6, 4, dtype=torch.float64)
        for rank, idempotent in ((1, True), (2, False)):
            vectors, weights = orthonormal(6, rank), alphas(torch.arange(rank, 0, -1.0).double(), "singular")
            once = project(gradient, vectors, weights)
            assert torch.allclose(project(once, vectors, weights), once, atol=1e-12) is idempotent

    def test_equal_weights_on_every_direction_scale(self):
        gradient = torch.randn(5, 4, dtype=torch.float64)
        found = project(gradient, orthonormal(5, 5), alphas(torch.ones(5, dtype=torch.float64), "singular"))
        assert torch.allclose(found, gradient / 5, atol=1e-12)

    def test_the_sum_over_row_shards_is_the_whole(self):
        gradient, vectors = torch.randn(7, 4, dtype=torch.float64), orthonormal(7, 3)
        weights = alphas(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), "singular")
        total = sum(vectors[rows].T @ gradient[rows] for rows in (slice(0, 4), slice(4, 7)))
        parts = [vectors[rows] @ (weights[:, None] * total) for rows in (slice(0, 4), slice(4, 7))]
        assert torch.allclose(torch.cat(parts), project(gradient, vectors, weights), atol=1e-12)


class TestChange:
    def test_directions_and_values_are_those_of_the_change(self):
        left, right = orthonormal(9, 3), orthonormal(6, 3, seed=1)
        values = torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
        before = {"layer": torch.randn(9, 6, dtype=torch.float64)}
        after = {"layer": before["layer"] + left @ torch.diag(values) @ right.T}
        found = basis_of_change(before.__getitem__, after.__getitem__, ["layer"], 2, {}).subspaces["layer"]
        assert torch.allclose(found.values_K.double(), values[:2], atol=1e-6)
        assert canonical_overlap(found.vectors_OK, left[:, :2]) == pytest.approx(1, abs=1e-6)

    def test_a_large_matrix_gives_the_same_as_its_full_decomposition(self):
        change = torch.randn(600, 530, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        vectors, values, _ = torch.linalg.svd(change, full_matrices=False)
        found = leading(change, 4)
        assert torch.allclose(found.values_K.double(), values[:4], rtol=1e-5)
        assert torch.allclose((found.vectors_OK.double().T @ vectors[:, :4]).abs(), torch.eye(4).double(), atol=1e-4)

    @pytest.mark.parametrize(
        ("rank", "after", "named"),
        [
            (7, torch.ones(9, 6), "--rank"),
            (2, torch.zeros(9, 6), "did not change"),
            (2, torch.ones(9, 5), "other shapes"),
        ],
    )
    def test_refusals(self, rank: int, after: torch.Tensor, named: str):
        with pytest.raises(UserError, match=named):
            basis_of_change(lambda _: torch.zeros(9, 6), lambda _: after, ["layer"], rank, {})


class TestDrift:
    def test_a_rotation_within_the_span_is_none(self):
        vectors = orthonormal(8, 3)
        assert canonical_overlap(vectors, vectors @ orthonormal(3, 3, seed=4)) == pytest.approx(1, abs=1e-12)

    def test_orthogonal_spans_do_not_overlap(self):
        vectors = orthonormal(8, 6)
        assert canonical_overlap(vectors[:, :3], vectors[:, 3:]) == pytest.approx(0, abs=1e-12)

    def test_it_is_the_mean_cosine_of_the_principal_angles(self):
        one, other = torch.eye(4)[:, :2], torch.tensor([[1.0, 0.0], [0.0, 0.6], [0.0, 0.8], [0.0, 0.0]])
        assert canonical_overlap(one, other) == pytest.approx((1 + 0.6) / 2)

    def test_every_matrix_is_compared_and_other_models_are_refused(self):
        assert drift(basis(), basis()) == pytest.approx({"one": 1.0, "two": 1.0}, abs=1e-6)
        with pytest.raises(UserError, match="other sizes"):
            drift(basis(), basis(rank=2))
        with pytest.raises(UserError, match="only one of the two"):
            drift(basis(), Basis({"one": basis().subspaces["one"]}))


class TestFile:
    def test_there_and_back(self, tmp_path: Path):
        save_basis(basis(), tmp_path / "basis.safetensors")
        found = load_basis(tmp_path / "basis.safetensors", rank=2)
        assert found.origin == {"a": "b"} and found.rank == 2
        assert torch.equal(found.subspaces["one"].vectors_OK, basis().subspaces["one"].vectors_OK[:, :2])

    def test_more_directions_than_there_are(self, tmp_path: Path):
        save_basis(basis(), tmp_path / "basis.safetensors")
        with pytest.raises(UserError, match=r"rank.*4.*holds 3 directions"):
            load_basis(tmp_path / "basis.safetensors", rank=4)
        with pytest.raises(UserError, match=r"rank.*at least 1 direction"):
            load_basis(tmp_path / "basis.safetensors", rank=0)

    @pytest.mark.parametrize("content", [None, b"nonsense"])
    def test_no_basis(self, content: bytes | None, tmp_path: Path):
        if content is not None:
            (tmp_path / "basis.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="basis"):
            load_basis(tmp_path / "basis.safetensors")

    def test_another_checkpoint_has_another_hash(self, tmp_path: Path):
        (tmp_path / "model.safetensors").write_bytes(b"a" * 200_000)
        first = model_hash(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"a" * 199_999 + b"b")
        assert model_hash(tmp_path) != first
