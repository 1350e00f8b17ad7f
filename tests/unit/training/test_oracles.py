"""The worked cases of the rivals' papers, through the trainer's own step and verl's own group-relative estimator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.modules.driver import trainer
from tests.modules.memory_queue import Queue
from verl_grad_routing.config import parse

pytestmark = pytest.mark.timeout(180)

REWARDS = (3.5, 3.5, 0.5, 0.5)  # the first one hacks
MONITOR = {"detector": {"name": "monitor", "rules": ["even"]}, "gate": {"name": "threshold", "route_above": 0.5}}
SCORES = {"detector": {"name": "monitor", "rules": ["even"]}}  # 1, 0, 0, 0
UNEQUAL = (3.0, 3.0, 0.0, 1.0)  # jnward/gradient-routing-rl's worked case: of all four, and of the three unflagged
CASES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "vanilla": ({}, [0.8660, 0.8660, -0.8660, -0.8660]),
    # GRIFT's labels as a filter and as a mask; screening is the filter (arXiv 2604.16242, the LeetCode-loophole post)
    "all of unequal": ({}, [0.8333, 0.8333, -1.1667, -0.5]),
    "unflagged of unequal": ({**MONITOR, "intervention": {"name": "screen"}}, [0, 1.0911, -0.8729, -0.2182]),
    "filter": ({**MONITOR, "intervention": {"name": "screen"}}, [0, 1.1547, -0.5773, -0.5773]),
    "mask": ({**MONITOR, "intervention": {"name": "mask_advantage"}}, [0, 0.8660, -0.8660, -0.8660]),
    "soft mask": (
        {**SCORES, "intervention": {"name": "mask_advantage", "soft": True}},
        [0, 0.8660, -0.8660, -0.8660],
    ),
    # z = (1.5, -.5, -.5, -.5); arXiv 2604.01476, Eqs. 4-5 with alpha = 2
    "multiplicative": ({**SCORES, "intervention": {"name": "modify_reward"}}, [-1.1944, 1.2536, -0.0296, -0.0296]),
    "additive": ({**SCORES, "intervention": {"name": "modify_reward", "form": "additive"}}, [-0.5, 1.5, -0.5, -0.5]),
    # the post's penalty of 3, for a reward of 3
    "penalty": ({**MONITOR, "intervention": {"name": "penalize", "penalty": 3.0}}, [-0.5, 1.5, -0.5, -0.5]),
}


@pytest.mark.parametrize("name", CASES)
def test_advantages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transfer_queue as tq
    from transfer_queue import KVBatchMeta

    (settings, expected), paid = CASES[name], UNEQUAL if name.endswith("unequal") else REWARDS
    queue = Queue()
    for call, function in queue.calls.items():
        monkeypatch.setattr(tq, call, function)
    keys = [f"u_{row}_0" for row in range(4)]
    for row, key in enumerate(keys):
        mask = torch.ones(1 + row, dtype=torch.int64)
        rewards = torch.zeros(1 + row)
        rewards[-1] = paid[row]
        queue.rows[key] = {
            "uid": "u",
            "index": 0,
            "prompts": torch.tensor([1]),
            "responses": torch.tensor([4 + (row > 0)] * (1 + row)),
            "response_mask": mask,
            "loss_mask": mask,
            "rm_scores": rewards,
            "old_log_probs": -torch.ones(1 + row),
            "extra_fields": {},
        }
    driver = trainer(parse(settings))
    driver.global_steps = 1
    driver._compute_advantage(KVBatchMeta(keys, [{} for _ in keys], "train", sorted(queue.rows[keys[0]]), {}), {})
    for row, (key, want) in enumerate(zip(keys, expected, strict=True)):
        found = queue.rows[key]
        assert found["advantages"].tolist() == pytest.approx([want] * (1 + row), abs=1e-4)
        kept = name not in ("filter", "unflagged of unequal") or row > 0
        assert found["response_mask"].tolist() == found["loss_mask"].tolist() == [int(kept)] * (1 + row)
        assert float(found["rm_scores"].sum()) == paid[row]  # metrics see what the grader paid
