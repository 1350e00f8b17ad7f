"""What a validation of the quarantine alone says about its proxy reward, and that a checkpoint keeps the schedule."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def test_what_a_validation_changes_reaches_the_checkpoint_that_was_written_before_it(tmp_path: Path) -> None:
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.config import build_methods, parse
    from verl_grad_routing.training.router import Router
    from verl_grad_routing.training.trainer.validation import DeployedValidation

    given = {"head_start_steps": 99, "head_start_until": 0.5, "head_start_measure": "swapped_reward"}
    settings = parse({"intervention": {"name": "route", **given}, "validate_swapped": True})
    router = Router(settings, build_methods(settings))
    saved: list[int] = []
    trainer: Any = SimpleNamespace(intervention=router.intervention, global_steps=10, resumed_at=10, saved_at=None)
    trainer.router, trainer.config = router, SimpleNamespace(trainer=SimpleNamespace(test_freq=4))
    trainer._save_state = lambda: saved.append(trainer.global_steps)
    trainer._measured = lambda measures: DeployedValidation._measured(trainer, measures)

    def observe(reward: float) -> int | None:
        DeployedValidation._after_validation(trainer, {"swapped_reward": reward})
        return router.intervention.head_start.reached

    assert observe(0.9) is None  # the step it resumed from, validated once more
    trainer.global_steps = trainer.saved_at = 20
    assert observe(0.1) is None and saved == [20]
    trainer.global_steps = trainer.saved_at = 30
    assert observe(0.7) == 30 and saved == [20, 30]
    trainer.global_steps = 40
    assert observe(0.8) == 30 and saved == [20, 30]


@pytest.mark.parametrize(
    ("measured_at", "test_freq", "counts"),
    [(None, 5, True), (5, 5, True), (10, 5, False), (None, 4, False), (None, -1, False)],
    ids=["killed between", "at an earlier validation", "measured", "not validated then", "never validated"],
)
def test_a_run_killed_between_saving_and_validating_is_told_after_it(
    measured_at: int | None, test_freq: int, counts: bool, tmp_path: Path
) -> None:
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.config import build_methods, parse
    from verl_grad_routing.training.router import Router
    from verl_grad_routing.training.trainer.validation import DeployedValidation

    settings = parse({"intervention": {"name": "route"}})
    killed, resumed = (Router(settings, build_methods(settings)) for _ in range(2))
    killed.measured_at = measured_at
    killed.save(str(tmp_path), {})
    resumed.load(str(tmp_path))
    told: list[dict] = []
    trainer: Any = SimpleNamespace(
        router=resumed,
        config=SimpleNamespace(trainer=SimpleNamespace(test_freq=test_freq)),
        global_steps=10,
        resumed_at=10,
        saved_at=None,
        _measured=told.append,
    )
    DeployedValidation._after_validation(trainer, {"swapped_reward": 0.5})
    assert told == ([{"swapped_reward": 0.5}] if counts else [])
    assert resumed.measured_at == (10 if counts else measured_at)
