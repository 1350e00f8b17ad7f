"""Whoever looks at a run in shadow draws from no generator of the run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from verl_grad_routing.training.random_state import same_random_state


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("fails", [False, True])
def test_draws_inside_move_nothing(fails: bool) -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = drawn()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    try:
        with same_random_state():
            assert drawn() == expected
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert drawn() == expected
