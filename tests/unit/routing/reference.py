"""A slow, independent account of routed gradients: every rollout alone, dense weights, plain autograd, a Python loop.

It shares nothing with the kernel: the adapters enter as one dense matrix ``W + s Σ_b gate_b B_b A_b`` per rollout, and
a block's gradient is the sum over rollouts of ``update_b ×`` that rollout's own gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_grad_routing.routing import routed_linear

PARAMETERS = ("A_d", "A_q", "B_d", "B_q")


@dataclass
class Problem:
    """Two adapted linears with attention-like mixing inside each rollout between them, and a nonlinear loss."""

    bases: list[tuple[Tensor, Tensor | None]]
    adapters: list[dict[str, Tensor]]
    rollouts: list[Tensor]
    targets: list[Tensor]
    scaling: float

    @property
    def lengths(self) -> list[int]:
        return [len(rollout) for rollout in self.rollouts]

    def to(self, dtype: torch.dtype) -> Problem:
        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        return Problem(
            [(cast(w), cast(b)) for w, b in self.bases],
            [{name: cast(p) for name, p in layer.items()} for layer in self.adapters],
            [cast(x) for x in self.rollouts],
            [cast(t) for t in self.targets],
            self.scaling,
        )


def make_problem(seed: int, ranks: tuple[int, int] = (3, 3), bias: bool = True, rows: int = 6) -> Problem:
    """Float64 problem of layers 7 → 9 → 6 with ``rows`` rollouts of 1 to 6 tokens, B not zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    bases, adapters = [], []
    for d_in, d_out in ((7, 9), (9, 6)):
        bases.append((draw(d_out, d_in) / d_in**0.5, draw(d_out) if bias else None))
        shapes = ((ranks[0], d_in), (ranks[1], d_in), (d_out, ranks[0]), (d_out, ranks[1]))
        adapters.append({name: draw(*shape, grad=True) for name, shape in zip(PARAMETERS, shapes, strict=True)})
    lengths = torch.randint(1, 7, (rows,), generator=generator).tolist()
    rollouts = [draw(length, 7, grad=True) for length in lengths]
    return Problem(bases, adapters, rollouts, [draw(length, 6) for length in lengths], scaling=0.7)


def mix(hidden: Tensor) -> Tensor:
    """Causal self-attention of one rollout ``[L, d]`` with a nonlinearity: tokens depend on earlier ones."""
    causal = torch.ones(len(hidden), len(hidden), dtype=torch.bool, device=hidden.device).tril()
    scores = (hidden @ hidden.t() / hidden.shape[-1] ** 0.5).masked_fill(~causal, float("-inf"))
    return torch.tanh(scores.softmax(-1) @ hidden)


def rollout_loss(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum() + torch.sin(output).sum()


def reference_gradients(problem: Problem, gate_B2: Tensor, update_B2: Tensor) -> tuple[list[dict[str, Tensor]], list]:
    """Sum over rollouts of ``update_b`` times their own gradient, and every rollout's own input gradient."""
    totals = [{name: torch.zeros_like(p) for name, p in layer.items()} for layer in problem.adapters]
    inputs = []
    for x, target, gates, updates in zip(problem.rollouts, problem.targets, gate_B2, update_B2, strict=True):
        hidden = x
        for index, ((weight, bias), p) in enumerate(zip(problem.bases, problem.adapters, strict=True)):
            delta = gates[0] * (p["B_d"] @ p["A_d"]) + gates[1] * (p["B_q"] @ p["A_q"])
            hidden = hidden @ (weight + problem.scaling * delta).t()
            hidden = hidden if bias is None else hidden + bias
            hidden = mix(hidden) if index == 0 else hidden
        flat = [p for layer in problem.adapters for p in layer.values()]
        *own, dx = torch.autograd.grad(rollout_loss(hidden, target), [*flat, x], allow_unused=True)
        inputs.append(dx)
        for layer, total in enumerate(totals):
            for position, name in enumerate(PARAMETERS):
                gradient = own[layer * 4 + position]
                total[name] += updates[0 if name.endswith("d") else 1] * gradient
    return totals, inputs


def apply_layer(problem: Problem, layer: int, x: Tensor, gate: Tensor | None, update: Tensor | None) -> Tensor:
    weight, bias = problem.bases[layer]
    p = problem.adapters[layer]
    return routed_linear(x, weight, bias, p["A_d"], p["A_q"], p["B_d"], p["B_q"], gate, update, problem.scaling)


def gradients(problem: Problem) -> list[dict[str, Tensor]]:
    """What ``backward()`` left in the adapters."""
    return [{name: p.grad for name, p in layer.items()} for layer in problem.adapters]


def relative_error(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> float:
    """Largest error of any parameter's gradient, relative to that gradient's largest entry (or absolute below 1)."""
    errors = []
    for have, want in zip(actual, expected, strict=True):
        for name in PARAMETERS:
            scale = max(1.0, float(want[name].abs().max()))
            errors.append(float((have[name].to(want[name].dtype) - want[name]).abs().max()) / scale)
    return max(errors)
