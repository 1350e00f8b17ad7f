"""The quarantine's share of a step, by hand."""

from __future__ import annotations

import pytest
import torch

from verl_grad_routing.training.block_shares import quarantine_share
from verl_grad_routing.training.block_step import BlockStep


@pytest.mark.parametrize(
    ("norms", "share"),
    [
        ({"deployed": 3.0, "quarantine": 1.0}, 0.25),
        ({"deployed": 0.0, "quarantine": 2.0}, 1.0),
        ({"deployed": 1.0, "quarantine": 0.0}, 0.0),
        ({"deployed": 1.0, "quarantine": 1.0, "shared": 8.0}, 0.5),  # of neither block
    ],
)
def test_share_of_both_norms(norms: dict[str, float], share: float) -> None:
    assert quarantine_share("update", norms) == {"routing/update_share/quarantine": share}


def test_nothing_is_said_of_nothing() -> None:
    assert quarantine_share("grad", {"deployed": 0.0, "quarantine": 0.0}) == {}
    assert quarantine_share("update", {}) == {}


def test_a_step_reports_both_shares() -> None:
    deployed, quarantine = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [deployed]}, {"params": [quarantine]}], lr=0.1)
    blocks = {"deployed": [deployed], "quarantine": [quarantine]}
    step = BlockStep(optimizer, blocks, {"deployed": 10.0, "quarantine": 1.0}, [])
    deployed.grad, quarantine.grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    step((1, 1), lambda: None)
    assert step.metrics["routing/grad_share/quarantine"] == pytest.approx(4 / 7)  # before clipping
    assert step.metrics["routing/update_share/quarantine"] == pytest.approx(0.1 / 0.4)  # after it, at 1
