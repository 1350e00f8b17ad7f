"""The quarantine's share of a step, by hand."""

from __future__ import annotations

import pytest

from verl_grad_routing.training.block_shares import quarantine_share


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
