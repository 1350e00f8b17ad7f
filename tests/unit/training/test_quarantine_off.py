"""Which rollouts are sampled with the quarantine off: counts, draws, marks, and the two parts of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.quarantine_off import MARK, drawn_prompts, off_rows, part_size, prompt_of

pytestmark = pytest.mark.timeout(180)


def test_a_share_is_a_whole_number_of_rows():
    assert [part_size(share, 16, "prompts") for share in (0.0625, 0.25, 0.5)] == [1, 4, 8]
    assert part_size(1 / 3, 3, "prompts") == 1
    for share in (0.3, 0.01, 1 - 1e-9):
        with pytest.raises(UserError, match="of 16 prompts; give a multiple of 1/16"):
            part_size(share, 16, "prompts")


def test_prompts_are_drawn_anew_each_step_and_the_same_for_a_seed():
    draws = [drawn_prompts(4, 16, seed=0, step=step) for step in range(1, 200)]
    assert draws == [drawn_prompts(4, 16, seed=0, step=step) for step in range(1, 200)]
    assert draws != [drawn_prompts(4, 16, seed=1, step=step) for step in range(1, 200)]
    assert all(len(set(rows)) == 4 and rows == sorted(rows) for rows in draws)
    counts = np.bincount(np.concatenate(draws), minlength=16)
    assert counts.sum() == 4 * 199
    assert counts.min() > 30 and counts.max() < 72  # 50 expected, standard deviation 6


def test_a_key_tells_who_sampled_it_pad_rows_included():
    keys = ["a-1_0_0", "a-1-off_0_0", "b-off_13_2", "pad0ff_0_0", "offer_1_0"]
    assert off_rows(keys).tolist() == [0, 1, 1, 0, 0]
    assert prompt_of("a-1-off_13_2") == "a-1-off"


def sampler(**settings: Any) -> Any:
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.config import GradRoutingConfig
    from verl_grad_routing.training.trainer.sampling import Sampling

    trainer = object.__new__(Sampling)
    trainer.settings = GradRoutingConfig(**settings)
    trainer.global_steps = 3
    rollout = SimpleNamespace(n=8)
    trainer.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))
    return trainer


def prompts(count: int) -> Any:
    from verl.utils import tensordict_utils as tu

    columns = {
        "uid": np.array([f"u{row}" for row in range(count)], dtype=object),
        "raw_prompt": np.array([[{"role": "user", "content": str(row)}] for row in range(count)], dtype=object),
        "dummy_tensor": torch.arange(count),
    }
    batch = tu.get_tensordict(columns)
    tu.assign_non_tensor_data(batch, "global_steps", 3)
    return batch


def contents(part: Any) -> list[str]:
    return [row[0]["content"] for row in part["raw_prompt"]]


def test_whole_prompts_are_split():
    on, off = sampler(quarantine_off_share=0.25)._parts(prompts(8))
    assert len(on) == 6 and len(off) == 2
    assert sorted(contents(on) + contents(off)) == [str(row) for row in range(8)]
    assert list(on["uid"]) == [f"u{name}" for name in contents(on)]
    assert list(off["uid"]) == [f"u{name}-off" for name in contents(off)]
    assert off["dummy_tensor"].tolist() == [int(name) for name in contents(off)]
    assert contents(off) == [str(row) for row in drawn_prompts(2, 8, 0, 3)]
    for part in (on, off):
        assert part["global_steps"] == 3 and "__rollout_n__" not in part


def test_the_rollouts_of_every_prompt_are_split():
    on, off = sampler(quarantine_off_share=0.25, quarantine_off_unit="rollout")._parts(prompts(3))
    assert contents(on) == contents(off) == ["0", "1", "2"]
    assert list(on["uid"]) == ["u0", "u1", "u2"] and list(off["uid"]) == ["u0-off", "u1-off", "u2-off"]
    assert (on["__rollout_n__"], off["__rollout_n__"]) == (6, 2)


def test_the_workers_share_of_a_part_still_has_its_numbers():
    """verl cuts a batch into one chunk a worker and reads columns and settings of each."""
    _, off = sampler(quarantine_off_share=0.25, quarantine_off_unit="rollout")._parts(prompts(3))
    for chunk in off.chunk(2):
        for key, value in chunk.items():
            if key == "__rollout_n__":
                assert value.data == 2 or [row.data for row in value] == [2] * len(chunk)


def test_prompts_that_have_a_number_of_rollouts_of_their_own_are_refused():
    from verl.utils import tensordict_utils as tu

    batch = prompts(3)
    tu.assign_non_tensor_stack(batch, "__rollout_n__", [1, 2, 3])
    with pytest.raises(UserError, match=r"quarantine_off_unit='rollout'.*__rollout_n__"):
        sampler(quarantine_off_share=0.25, quarantine_off_unit="rollout")._parts(batch)


def test_the_second_part_is_submitted_after_the_first_has_ended_and_the_weights_are_sent(monkeypatch):
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    trainer, told = sampler(quarantine_off_share=0.5), []
    trainer.timing_raw = {}
    trainer.replay_buffer = SimpleNamespace(wait_for=lambda uids, partition: told.append(("wait", uids, partition)))
    trainer._send_weights = lambda blocks, version: told.append(("send", blocks, version))
    monkeypatch.setattr(PPOTrainer, "_submit_batch_to_rollout", lambda self, part: told.append(("submit", len(part))))
    assert trainer._submit_batch_to_rollout(prompts(4)) == 4
    assert [what for what, *_ in told] == ["submit", "wait", "send", "submit"]
    assert told[2] == ("send", ("deployed",), 2)  # the weights that step 2 made
    assert trainer.timing_raw["gen"] >= trainer.timing_raw["quarantine_off_sync"] >= 0


def test_by_request_both_parts_are_submitted_at_once_and_no_weights_are_sent(monkeypatch):
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    trainer, told = sampler(quarantine_off_share=0.5, quarantine_off_by="request"), []
    monkeypatch.setattr(PPOTrainer, "_submit_batch_to_rollout", lambda self, part: told.append(list(part["uid"])))
    assert trainer._submit_batch_to_rollout(prompts(4)) == 4
    assert [len(part) for part in told] == [2, 2]
    assert [uid.endswith(MARK) for part in told for uid in part] == [False, False, True, True]


def test_without_a_share_verls_own_submission_is_made(monkeypatch):
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    told = []
    monkeypatch.setattr(PPOTrainer, "_submit_batch_to_rollout", lambda self, part: told.append(part) or len(part))
    batch = prompts(4)
    assert sampler()._submit_batch_to_rollout(batch) == 4 and told == [batch]


def test_waiting_ends_with_the_last_prompt_failed_ones_included(monkeypatch):
    from verl_grad_routing.training.replay import RoutedReplayBuffer

    buffer = object.__new__(RoutedReplayBuffer)
    buffer.finished_keys, buffer.failure_keys = {"train": set()}, {"train": {"c"}}
    arriving, polls = ["a", "b"], []
    monkeypatch.setattr(buffer, "_sync_metadata_from_transfer_queue", lambda: None)

    def poll(partition, last):
        polls.append(partition)
        buffer.finished_keys["train"].add(arriving[len(polls) - 1])
        return last

    monkeypatch.setattr(buffer, "_wait_for_next_poll", poll)
    buffer.wait_for(["a", "b", "c"], "train")
    assert polls == ["train", "train"]


def test_every_finished_rollout_is_progress_not_only_whole_prompts(monkeypatch):
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    from verl_grad_routing.training import replay

    now = [0.0]
    monkeypatch.setattr(replay.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ReplayBuffer, "_wait_for_next_poll", lambda self, partition, last: last)
    buffer = object.__new__(replay.RoutedReplayBuffer)
    buffer.poll_interval, buffer.partitions = 1.0, {"train": {}}
    buffer.finished_keys, buffer.failure_keys = {"train": set()}, {"train": set()}
    buffer.configure(rollout_timeout_s=10)

    def wait(until: float) -> None:
        now[0] = until
        buffer._wait_for_next_poll("train", 0.0)

    wait(9)
    buffer.partitions["train"]["a_0_0"] = {}
    wait(18)
    buffer.finished_keys["train"].add("a")
    wait(27)
    wait(36)
    with pytest.raises(RuntimeError, match=r"rollout_timeout_s=10.*no rollout of partition 'train'"):
        wait(38)


def test_rates_of_the_two_parts():
    from verl_grad_routing.training.trainer.sampling import off_metrics

    off_B = torch.tensor([True, False, False, False])
    facts = {"hack": torch.tensor([0.0, 1, 1, 0]), "solve": torch.tensor([1.0, 0, 0, 0])}
    assert off_metrics(facts, off_B) == {
        "quarantine_off/share": 0.25,
        "hack/rate_quarantine_off": 0.0,
        "hack/rate_quarantine_on": pytest.approx(2 / 3),
        "solve/rate_quarantine_off": 1.0,
        "solve/rate_quarantine_on": 0.0,
    }
    assert off_metrics(facts, None) == {}
