"""A step with rollouts sampled with the quarantine off: what the driver writes, asks for and takes out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.modules.driver import trainer
from tests.modules.memory_queue import Queue
from verl_grad_routing.config import parse
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import DEFAULT

pytestmark = pytest.mark.timeout(180)

# two prompts; of each, one part with both blocks (two rollouts) and one without the quarantine (three)
KEYS = [
    f"{uid}_{session}_0" for prompt in "ab" for uid, n in ((prompt, 2), (f"{prompt}-off", 3)) for session in range(n)
]
OFF = [0, 0, 1, 1, 1] * 2
ROUTE_EVEN = {
    "detector": {"name": "monitor", "rules": ["even"]},
    "gate": {"name": "threshold", "route_above": 0.5, "keep_below": 0.5},
    "intervention": {"name": "route"},
    "quarantine_off_share": 0.5,
    "quarantine_off_unit": "rollout",
}


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    import transfer_queue as tq

    made = Queue()
    for name, call in made.calls.items():
        monkeypatch.setattr(tq, name, call)
    for index, key in enumerate(KEYS):
        made.rows[key] = {
            "uid": key.split("_")[0],
            "index": "ab".index(key[0]),
            "prompts": torch.tensor([3, 4]),
            # odd texts are clean; of the first prompt's second part one is flagged, of the second prompt's two are
            "responses": torch.tensor([6 if index in (2, 7, 8) else 5, 2]),
            "response_mask": torch.ones(2, dtype=torch.int64),
            "loss_mask": torch.ones(2, dtype=torch.int64),
            "rm_scores": torch.tensor([0.0, float(index % 2)]),
            "old_log_probs": torch.tensor([-1.0, -2.0]),
            "rollout_log_probs": torch.tensor([-1.0, -2.5 if OFF[index] else -2.0]),
            "extra_fields": {"reward_extra_info": {"hack": float(index == 2), "solve": 0.0}},
        }
    return made


@pytest.fixture
def batch(queue: Queue) -> Any:
    from transfer_queue import KVBatchMeta

    return KVBatchMeta(list(KEYS), [{} for _ in KEYS], "train", sorted(queue.rows[KEYS[0]]), {})


def made(**settings: Any) -> Any:
    driver = trainer(parse({**ROUTE_EVEN, **settings}))
    driver.global_steps = 1
    return driver


@pytest.mark.parametrize("advantages", ["apart", "together"])
def test_every_row_says_who_sampled_it_and_groups_are_as_asked(
    advantages: str, queue: Queue, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    monkeypatch.setattr(PPOTrainer, "_balance_batch", lambda self, rows, *args, **kwargs: rows)
    made(quarantine_off_advantages=advantages)._balance_batch(batch, {})
    assert [int(queue.rows[key]["quarantine_off"]) for key in KEYS] == OFF
    uids = [queue.rows[key]["uid"] for key in KEYS]
    if advantages == "together":
        assert uids == ["a"] * 5 + ["b"] * 5
    else:
        assert uids == [key.split("_")[0] for key in KEYS]


def test_by_request_every_row_must_have_been_sampled_by_the_adapter_that_its_key_says(
    queue: Queue, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    monkeypatch.setattr(PPOTrainer, "_balance_batch", lambda self, rows, *args, **kwargs: rows)
    driver = made(quarantine_off_by="request")
    for key, off in zip(KEYS, OFF, strict=True):
        queue.rows[key]["extra_fields"]["grad_routing_adapter"] = "deployed" if off else "both"
    driver._balance_batch(batch, {})
    assert [int(queue.rows[key]["quarantine_off"]) for key in KEYS] == OFF
    for row, told in ((2, "both, not deployed"), (5, "deployed, not both")):
        right = queue.rows[KEYS[row]]["extra_fields"].pop("grad_routing_adapter")
        with pytest.raises(UserError, match="sampled by None"):  # an agent loop on a server of verl's own
            driver._balance_batch(batch, {})
        queue.rows[KEYS[row]]["extra_fields"]["grad_routing_adapter"] = "both" if OFF[row] else "deployed"
        with pytest.raises(UserError, match=rf"default_agent_loop=.*{KEYS[row]} was sampled by {told}"):
            driver._balance_batch(batch, {})
        queue.rows[KEYS[row]]["extra_fields"]["grad_routing_adapter"] = right


def test_by_request_the_sync_after_the_step_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_grad_routing.training.trainer.sampling import DeployedValidation

    monkeypatch.setattr(DeployedValidation, "on_sample_end", lambda self: None, raising=False)
    driver, told = made(quarantine_off_by="request"), []
    driver.actor_rollout_wg = SimpleNamespace(export_blocks=told.append)
    driver.on_sample_end()
    assert not told


def test_old_log_probs_are_asked_for_under_the_gate_of_sampling(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    seen = []

    def old_log_prob(self: Any, rows: Any, metrics: dict) -> Any:
        seen.append(dict(rows.extra_info))
        return rows

    monkeypatch.setattr(PPOTrainer, "_compute_old_log_prob", old_log_prob)
    metrics: dict[str, float] = {}
    driver = made()
    driver.config.actor_rollout_ref.rollout.calculate_log_probs = True
    assert "sampling_gate" not in driver._compute_old_log_prob(batch, metrics).extra_info
    made(quarantine_off_share=0.0)._compute_old_log_prob(batch, {})
    assert [asked.get("sampling_gate") for asked in seen] == [True, None]
    # 0 and .5 by turns, over the rows without the quarantine
    assert metrics == {"quarantine_off/log_prob_diff_mean": 0.25, "quarantine_off/log_prob_diff_max": 0.5}


def test_the_sync_after_the_step_sends_both_blocks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    monkeypatch.setattr(PPOTrainerSync, "on_sample_end", lambda self: None)
    sent: list[tuple[str, ...]] = []
    for share in (0.5, 0.0):
        driver = made(quarantine_off_share=share)
        driver.actor_rollout_wg = SimpleNamespace(export_blocks=sent.append)
        driver.on_sample_end()
    assert sent == [("deployed", "quarantine")]


def test_flagged_rows_of_the_deployed_policy_leave_and_thin_groups_with_them(queue: Queue, batch: Any) -> None:
    metrics: dict[str, float] = {}
    driver = made()
    driver._compute_advantage(batch, metrics)
    left = [int(queue.rows[key]["response_mask"].sum()) for key in KEYS]
    assert left == [2, 2, 0, 2, 2, 2, 2, 0, 0, 0]
    assert [int(queue.rows[key]["loss_mask"].sum()) for key in KEYS] == left
    assert metrics["intervention/share_rejected"] == 0.4 and metrics["quarantine_off/share"] == 0.6
    assert metrics["hack/rate_quarantine_off"] == pytest.approx(1 / 6) and metrics["hack/rate_quarantine_on"] == 0
    # rewards 0 and 1 of a pair, whatever was taken out of the group: advantages of both signs, none clamped
    kept = [float(queue.rows[key]["advantages"][0]) for key in ("a-off_1_0", "a-off_2_0")]
    assert kept == [pytest.approx(0.5**0.5, abs=1e-5), pytest.approx(-(0.5**0.5), abs=1e-5)]
    assert float(queue.rows["a_0_0"]["advantages"][0]) == 0  # KEEP with both blocks: clamped
    assert driver._tables() == {"routing_table": DEFAULT, "quarantine_off_table": DEFAULT.without_quarantine()}


def test_only_kept_rows_of_both_blocks_take_new_old_log_probs(queue: Queue, batch: Any) -> None:
    """Where the step is several updates: those sampled without the quarantine have the log-probs of their policy."""
    driver, asked = made(), []
    driver.config.actor_rollout_ref.actor.ppo_mini_batch_size = 1
    driver._even_rows = lambda count: (count, {})

    def pass_(rows: Any, extra: dict[str, Any]) -> None:
        asked.extend(rows.keys)
        for key in rows.keys:  # verl's column is as long as prompt and response
            queue.rows[key]["log_probs"] = torch.tensor([0.0, -7.0, -8.0, 0.0])

    driver._log_prob_pass = pass_
    driver._compute_advantage(batch, {})
    assert asked == ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
    for key, off in zip(KEYS, OFF, strict=True):
        assert queue.rows[key]["old_log_probs"].tolist() == ([-1.0, -2.0] if off else [-7.0, -8.0])
