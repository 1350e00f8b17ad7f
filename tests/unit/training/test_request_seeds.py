"""Seeds of requests to the rollout engine: of what a rollout is, and of nothing that differs between two runs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(180)

ROW = {
    "raw_prompt": [{"role": "user", "content": "NAab="}],
    "index": 3,
    "global_steps": 7,
    "session_id": 1,
    "uid": "a-random-name",
}


def seed_of(seed: int = 0, **changed: Any) -> int:
    from verl_grad_routing.training.request_seeds import request_seed

    return request_seed(seed, ROW | changed)


def test_a_seed_is_of_run_step_prompt_and_number_alone() -> None:
    from verl_grad_routing.training.quarantine_off import MARK

    same = seed_of()
    assert 0 <= same < 2**31 and same == seed_of(uid="another-random-name", reward_model={"ground_truth": "x"})
    other = [seed_of(1), seed_of(index=4), seed_of(global_steps=8), seed_of(session_id=0), seed_of(uid=f"a{MARK}")]
    other.append(seed_of(raw_prompt=[{"role": "user", "content": "NAba="}]))  # two files of data may share an index
    assert len({same, *other}) == 7


def test_rollouts_of_a_batch_have_seeds_of_their_own() -> None:
    drawn = {seed_of(index=index, session_id=number) for index in range(256) for number in range(16)}
    assert len(drawn) > 4090


def test_the_agent_loop_adds_the_seed_and_nothing_else() -> None:
    from verl_grad_routing.training.request_seeds import SeededRequests

    class Loop:
        async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
            return sampling_params, kwargs

    class Mine(SeededRequests, Loop):
        rollout_config = SimpleNamespace(seed=5)

    given = {"temperature": 1.0}
    asked, kwargs = asyncio.run(Mine().run(given, priority=2, **ROW))
    assert asked == {"temperature": 1.0, "seed": seed_of(5)} and kwargs == {"priority": 2, **ROW}
    assert given == {"temperature": 1.0}  # shared by all rollouts of a batch


def test_verl_finds_it_by_name_in_a_process_that_imports_nothing_of_ours() -> None:
    code = "from verl.experimental.agent_loop.agent_loop import _agent_loop_registry as known; print(known)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=True)
    for name in ("SeededSingleTurn", "ChoosingSingleTurn"):
        assert f"verl_grad_routing.training.agent_loops.{name}" in done.stdout


def test_runs_on_our_environments_take_it() -> None:
    from hydra import compose, initialize_config_module

    from verl_grad_routing.training.two_adapters import SEEDED

    with initialize_config_module("verl.trainer.config", version_base=None):
        seeded = compose("ppo_trainer", ["+grad_routing/seeds=one"])
        assert seeded.actor_rollout_ref.rollout.agent.default_agent_loop == SEEDED
        assert compose("ppo_trainer").actor_rollout_ref.rollout.agent.default_agent_loop == "single_turn_agent"
