"""Rows that are trusted to be clean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.trusted import column_of, trust, trusted_rows


def test_columns_and_keys_of_extra_info() -> None:
    keys = ("a", "b", "c")
    assert trusted_rows("clean", [True, 0, np.int64(1)], keys).tolist() == [True, False, True]
    rows = [{"clean": 1, "index": 3}, {"clean": False}, {"clean": np.bool_(True)}]
    assert trusted_rows("extra_info.clean", rows, keys).tolist() == [True, False, True]
    assert (column_of("clean"), column_of("extra_info.clean")) == ("clean", "extra_info")


@pytest.mark.parametrize("value", [0.5, "yes", None, 2])
def test_what_is_neither_true_nor_false_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"trusted_column \(clean\) of rollout k1=.*true or false"):
        trusted_rows("clean", [True, value], ("k0", "k1"))


def test_a_row_without_the_key_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout k0 has no extra_info\.clean"):
        trusted_rows("extra_info.clean", [{}], ("k0",))


def test_trusted_rollouts_are_kept_whatever_they_score() -> None:
    routes = torch.tensor([0, 1, 2, 2, 1])
    kept, metrics = trust(routes, torch.tensor([True, True, True, False, False]))
    assert kept.tolist() == [0, 0, 0, 2, 1]
    assert metrics == {"routing/share_trusted": pytest.approx(0.6), "routing/trusted_overruled": pytest.approx(1 / 3)}
    nobody, metrics = trust(routes, torch.zeros(5, dtype=torch.bool))
    assert torch.equal(nobody, routes) and metrics == {"routing/share_trusted": 0.0}
