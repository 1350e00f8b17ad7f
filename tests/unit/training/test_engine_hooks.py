"""The hooks that ship, on plain tensors: worked cases, off-switches, refusals. On a real engine: tests/engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from verl_grad_routing.errors import UserError
from verl_grad_routing.subspaces import Basis, Subspace, save_basis

pytestmark = pytest.mark.timeout(120)

NAME = "base_model.model.layer.lora_{side}.{adapter}.weight"


def build(name: str, **settings):
    import verl  # noqa: F401  (hooks live beside the engine)

    from verl_grad_routing.training.engine_hooks import ENGINE_HOOKS

    return ENGINE_HOOKS.build({"name": name, **settings}, "grad_routing.blocks.hooks")


class Quadratic:
    """L = ½ φᵀ diag(h) φ in two blocks of one number each."""

    def __init__(self, *curvatures: float):
        self.curvatures = curvatures
        self.parameters = [torch.nn.Parameter(torch.ones(1)) for _ in curvatures]
        self.blocks = dict(zip(("deployed", "quarantine"), [[p] for p in self.parameters], strict=True))
        self.asked = 0

    def gradients(self) -> None:
        self.asked += 1
        for parameter, curvature in zip(self.parameters, self.curvatures, strict=True):
            parameter.grad = curvature * parameter.detach()

    def run(self, hook) -> list[float]:
        self.gradients()
        with torch.no_grad():
            hook.transform_gradients(self.blocks, self.gradients)
        return [float(p.grad) for p in self.parameters if p.grad is not None]


class TestRegularizeGradient:
    @pytest.mark.parametrize("epsilon", [1e-3, 1e-2, 1.0])
    def test_worked_case(self, epsilon: float):
        # L = ½ φᵀHφ, H = diag(1, 10), φ = 1, γ = .01: g + γ H g = (1.01, 11), at any ε (arXiv 2602.18037, pseudocode)
        problem = Quadratic(1.0, 10.0)
        found = problem.run(build("regularize_gradient", gamma=0.01, epsilon=epsilon, clip=1e9))
        assert found == pytest.approx([1.01, 11.0], rel=1e-3 if epsilon < 1e-2 else 1e-4)

    def test_weights_are_put_back_bit_for_bit(self):
        problem = Quadratic(1 / 3, 0.7)
        with torch.no_grad():
            for parameter in problem.parameters:
                parameter.mul_(1 / 7)
        before = [p.detach().clone() for p in problem.parameters]
        problem.run(build("regularize_gradient", gamma=0.1))
        assert all(torch.equal(p, old) for p, old in zip(problem.parameters, before, strict=True))

    def test_both_gradients_are_clipped_jointly(self):
        # |∇L| = 5 at (1, 1) with H = diag(3, 4), clipped to 1: g1 = (.6, .8); φ' = (1.6, 1.8), g2 ∝ (4.8, 7.2)
        problem = Quadratic(3.0, 4.0)
        found = problem.run(build("regularize_gradient", gamma=0.5, epsilon=1.0, clip=1.0))
        norm = (4.8**2 + 7.2**2) ** 0.5
        assert found == pytest.approx([0.6 + 0.5 * (4.8 / norm - 0.6), 0.8 + 0.5 * (7.2 / norm - 0.8)], rel=1e-5)

    def test_gamma_0_asks_for_nothing(self):
        problem = Quadratic(100.0, 3.0)
        assert problem.run(build("regularize_gradient", gamma=0.0)) == [100.0, 3.0]
        assert problem.asked == 1

    def test_a_block_without_mass_stays_out(self):
        problem = Quadratic(1.0, 10.0)
        own = problem.gradients

        def without_quarantine() -> None:
            own()
            problem.parameters[1].grad = None

        problem.gradients = without_quarantine  # type: ignore[method-assign]
        assert problem.run(build("regularize_gradient", gamma=0.01, clip=1e9)) == pytest.approx([1.01], rel=1e-3)
        assert problem.parameters[1].item() == 1.0

    def test_a_gradient_that_is_not_finite_moves_nothing(self):
        problem = Quadratic(float("inf"), 1.0)
        problem.run(build("regularize_gradient", gamma=0.01))
        assert problem.asked == 1 and [float(p) for p in problem.parameters] == [1.0, 1.0]

    def test_rounded_weights_are_refused(self):
        problem = Quadratic(1.0, 1.0)
        problem.parameters[0].data = problem.parameters[0].data.bfloat16()
        with pytest.raises(UserError, match="float32"):
            problem.run(build("regularize_gradient"))

    @pytest.mark.parametrize("settings", [{"gamma": -1}, {"epsilon": 0}, {"clip": 0}, {"gama": 1}])
    def test_settings(self, settings: dict):
        with pytest.raises(UserError, match=r"grad_routing\.blocks\.hooks\."):
            build("regularize_gradient", **settings)


def adapter_blocks(outputs: int = 3, rank: int = 2) -> tuple[dict, dict]:
    """Named parameters of one module with both blocks, and the same by block."""
    generator = torch.Generator().manual_seed(0)
    named, blocks = {}, {}
    for block, adapter in (("deployed", "default"), ("quarantine", "quarantine")):
        for side, shape in (("A", (rank, 4)), ("B", (outputs, rank))):
            parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
            parameter.grad = torch.randn(shape, generator=generator)
            named[NAME.format(side=side, adapter=adapter)] = parameter
            blocks.setdefault(block, []).append(parameter)
    return named, blocks


def none() -> None:
    raise AssertionError("no second gradient is needed")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def one(vectors: torch.Tensor, values: torch.Tensor, module: str = "layer") -> str:
        path = tmp_path / "basis.safetensors"
        save_basis(Basis({module: Subspace(vectors, values)}, {"model_hash": "of another model"}), path)
        return str(path)

    return one


class TestProjectUpdate:
    def test_worked_case_on_the_output_side_alone(self, write):
        # U = I (3 x 2), alpha = (.75, .25) (arXiv 2605.25189)
        named, blocks = adapter_blocks()
        gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        for name, parameter in named.items():
            if ".lora_B." in name:
                parameter.grad = gradient.clone()
        inputs = {name: p.grad.clone() for name, p in named.items() if ".lora_A." in name}
        hook = build("project_update", basis=write(torch.eye(3)[:, :2], torch.tensor([3.0, 1.0])), rank=2)
        hook.bind(named)
        hook.transform_gradients(blocks, none)
        for name, parameter in named.items():
            expected = inputs.get(name, torch.tensor([[0.75, 1.5], [0.75, 1.0], [0.0, 0.0]]))
            assert torch.equal(parameter.grad, expected), name
        assert hook.metrics["share_inside"] == pytest.approx((1 + 4 + 9 + 16) / (1 + 4 + 9 + 16 + 25 + 36))
        assert hook.metrics["share_kept"] == pytest.approx((0.75**2 * 5 + 0.25**2 * 25) / 91)

    def test_adams_first_step_leaves_the_subspace_and_the_projected_update_does_not(self, write):
        # U = (2, 1)/√5, G = e1: the projected gradient is (.8, .4), Adam's first step along (1, 1)
        direction = torch.tensor([[2.0], [1.0]]) / 5**0.5
        for mode, stays in (("grad", False), ("update", True)):
            parameter = torch.nn.Parameter(torch.zeros(2, 1))
            named, blocks = {NAME.format(side="B", adapter="default"): parameter}, {"deployed": [parameter]}
            hook = build("project_update", basis=write(direction, torch.ones(1)), rank=1, project=mode)
            hook.bind(named)
            optimizer = torch.optim.Adam([parameter], lr=0.1)
            parameter.grad = torch.tensor([[1.0], [0.0]])
            with torch.no_grad():
                hook.transform_gradients(blocks, none)
                if mode == "grad":
                    assert torch.allclose(parameter.grad, torch.tensor([[0.8], [0.4]]))
                before = {"deployed": [parameter.detach().clone()]}
                optimizer.step()
                hook.transform_update(blocks, before)
            inside = float((direction.T @ parameter).square() / parameter.square().sum())
            assert inside == pytest.approx(1.0 if stays else 0.9, abs=1e-4)

    @pytest.mark.parametrize("mode", ["grad", "update"])
    def test_the_identity_with_unit_weights_changes_no_bit(self, mode: str, write):
        named, blocks = adapter_blocks()
        path = write(torch.eye(3), torch.ones(3))
        hook = build("project_update", basis=path, rank=3, weights="ones", project=mode)
        hook.bind(named)
        gradients = {name: p.grad.clone() for name, p in named.items()}
        before = {block: [p.detach() - 1 / 3 for p in parameters] for block, parameters in blocks.items()}
        values = {name: p.detach().clone() for name, p in named.items()}
        with torch.no_grad():
            hook.transform_gradients(blocks, none)
            hook.transform_update(blocks, before)
        assert all(torch.equal(p.grad, gradients[name]) and torch.equal(p, values[name]) for name, p in named.items())

    def test_frozen_inputs_are_not_stepped(self, write):
        named, blocks = adapter_blocks()
        hook = build("project_update", basis=write(torch.eye(3), torch.ones(3)), rank=3, lora_a="frozen")
        hook.bind(named)
        hook.transform_gradients(blocks, none)
        assert all((p.grad is None) == (".lora_A." in name) for name, p in named.items())

    def test_a_block_without_mass_stays_out(self, write):
        named, blocks = adapter_blocks()
        for parameter in blocks["quarantine"]:
            parameter.grad = None
        hook = build("project_update", basis=write(torch.eye(3)[:, :1], torch.ones(1)), rank=1)
        hook.bind(named)
        hook.transform_gradients(blocks, none)
        assert all(p.grad is None for p in blocks["quarantine"]) and blocks["deployed"][1].grad[1:].abs().max() == 0

    @pytest.mark.parametrize(
        ("module", "outputs", "rank", "named"),
        [
            ("other", 3, 2, "no directions of layer"),
            ("layer", 4, 2, "3 outputs"),
            ("layer", 3, 3, "holds 2 directions"),
        ],
    )
    def test_a_basis_that_does_not_fit(self, module: str, outputs: int, rank: int, named: str, write):
        hook = build("project_update", basis=write(torch.eye(outputs)[:, :2], torch.ones(2), module), rank=rank)
        with pytest.raises(UserError, match=named):
            hook.bind(adapter_blocks()[0])

    def test_a_basis_of_another_model_is_refused_before_anything_starts(self, write, tmp_path: Path):
        (tmp_path / "model").mkdir()
        hook = build("project_update", basis=write(torch.eye(3)[:, :2], torch.ones(2)), rank=2)
        with pytest.raises(UserError, match="another model"):
            hook.check(str(tmp_path / "model"))

    @pytest.mark.parametrize("settings", [{"rank": 0}, {"project": "both"}, {"weights": "none"}, {"lora_a": True}])
    def test_settings(self, settings: dict):
        with pytest.raises(UserError, match=r"grad_routing\.blocks\.hooks\."):
            build("project_update", basis="nowhere", **settings)
