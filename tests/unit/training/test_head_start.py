"""What a validation of the quarantine alone says about its proxy reward, and that a checkpoint keeps the schedule."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(180)


def test_the_reward_is_verls_mean_over_data_sources() -> None:
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.training.trainer.validation import mean_reward

    metrics = {
        "val-core/loopholes/reward/mean@1": 0.5,
        "val-aux/other/reward/mean@4": 1.0,
        "val-core/loopholes/acc/mean@1": 9.0,
        "val-aux/loopholes/hack/mean@1": 9.0,
        "val-aux/loopholes/reward/std@4": 9.0,
        "val-aux/loopholes/solve_reward/mean@1": 9.0,
    }
    assert mean_reward(metrics) == 0.75
    assert math.isnan(mean_reward({}))


@pytest.mark.parametrize("until", [None, 0.5])
def test_a_checkpoint_keeps_where_the_head_start_ended(until: float | None, tmp_path: Path) -> None:
    from verl_grad_routing.config import build_methods, parse
    from verl_grad_routing.training.router import Router

    settings = parse({"intervention": {"name": "route", "head_start_steps": 9, "head_start_until": until}})
    first, resumed = (Router(settings, build_methods(settings)) for _ in range(2))
    first.intervention.observe(2, {"flagged": 0.7})
    first.save(str(tmp_path), {})
    resumed.load(str(tmp_path))
    assert resumed.intervention.head_start.reached == (2 if until else None)
