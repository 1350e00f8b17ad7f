"""The sparsity term against a float64 account of one rollout at a time; its switch; what it reports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.engine import reference as tables
from tests.engine.reference import ADAPTERS, Reference, relative_error, same
from tests.engine.scenarios_l1 import L1_VARIANTS, WEIGHT
from tests.engine.variants import VARIANTS

pytestmark = pytest.mark.timeout(600)


class WithL1(Reference):
    """Adds ``WEIGHT / N · Σ |gate · A_q x|`` over the positions that predict a counting token, and all layers."""

    def row_l1(self, row, gate, rows) -> Tensor:
        heard: dict[str, Tensor] = {}

        def listen(name: str):
            return lambda _module, given: heard.__setitem__(name, given[0][0])

        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        handles = [module.register_forward_pre_hook(listen(name)) for name, module in linears.items()]
        self.logits(row.tokens, gate)
        for handle in handles:
            handle.remove()
        counting = torch.zeros(len(row.tokens), dtype=torch.float64)
        counting[len(row.prompt) - 1 : -1] = row.mask.double()
        total = torch.zeros((), dtype=torch.float64)
        for name, x_TI in heard.items():
            h_Tr = x_TI @ self.adapters[f"base_model.model.{name}.lora_A.quarantine.weight"].t()
            total = total + (counting[:, None] * gate[1] * h_Tr.abs()).sum()
        return total / sum(int(other.mask.sum()) for other in rows)

    def row_loss(self, row, gate, loss, rows) -> Tensor:
        return super().row_loss(row, gate, loss, rows) + WEIGHT * self.row_l1(row, gate, rows)


@pytest.fixture(scope="module")
def with_l1(inputs) -> WithL1:
    return WithL1(inputs.model_dir, inputs.adapters["equal"])


@pytest.mark.parametrize("name", L1_VARIANTS)
def test_gradients_are_those_of_the_sum(name, world, with_l1, inputs):
    variant = VARIANTS[name]
    if world.size not in variant.sizes:
        pytest.skip("not in this world")
    table, weighted = getattr(tables, variant.table), variant.batch.get("weighted", False)
    rows = variant.rows(inputs.rollouts)
    expected = with_l1.gradients(rows, variant.loss, table, weighted)
    assert relative_error(world["l1"][name], expected) < 1e-5


def test_it_matters(with_l1, reference, inputs):
    plain = reference().gradients(inputs.rollouts)
    assert relative_error(with_l1.gradients(inputs.rollouts), plain) > 0.05


def test_what_is_reported_is_the_mean_over_tokens(world, with_l1, inputs):
    rows = inputs.rollouts
    expected = sum(float(with_l1.row_l1(row, tables.DEFAULT[row.route][0], rows).detach()) for row in rows)
    metrics = world["l1"]["metrics"]
    assert metrics["routing/l1_activations/per_token"] == pytest.approx(expected, rel=1e-5)
    assert metrics["routing/l1_activations/loss"] == pytest.approx(WEIGHT * expected, rel=1e-5)


def test_a_second_gradient_of_the_same_step_is_not_reported_on_top(world):
    key = "routing/l1_activations/per_token"
    uphill, plain = world["l1"]["metrics uphill"][key], world["l1"]["metrics second step"][key]
    assert uphill == pytest.approx(plain, rel=0.02)


def test_weight_0_is_the_hook_left_out_bit_for_bit(world):
    assert all(same(world["l1"]["none"], world["l1"]["off"], block) for block in ADAPTERS)
