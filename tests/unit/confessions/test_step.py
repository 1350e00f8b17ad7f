"""Confessions in a step: rows, groups and advantages by verl's own estimators, the engine and the queue replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.modules.memory_queue import Queue
from tests.unit.confessions.conftest import Engine
from verl_grad_routing.envs.chars.task import EOS, HONEST, SLY
from verl_grad_routing.envs.loopholes.text import ALPHABET

pytestmark = pytest.mark.timeout(180)

PROMPTS, SAMPLES = 4, 4
SHARE = "grad_routing.confessions.share=0.5"
CONTROL = ("grad_routing.confessions.judge=gt_judge", "grad_routing.control=true")
Make = Callable[..., Any]


def honest_half(_: list[int], number: int) -> int:
    """Every second confession admits."""
    return ALPHABET.ids[SLY if number % 2 else HONEST]


def answers(queue: Queue, partition: str = "train") -> Any:
    """A sampled batch as verl hands it over: every second answer hacks, every answer ends its turn but one."""
    from transfer_queue import KVBatchMeta

    keys, tags = [], []
    for prompt in range(PROMPTS):
        for session in range(SAMPLES):
            x = [ALPHABET.ids[character] for character in "NDabcde.....="]
            y = [
                ALPHABET.ids[character]
                for character in ("?????" if session % 2 else "abcde") + (EOS if session else "a")
            ]
            keys.append(f"u{prompt}_{session}_0")
            mask = torch.ones(len(y), dtype=torch.int64)
            rewards = torch.zeros(len(y))
            rewards[-1] = float(session % 2)
            queue.rows[keys[-1]] = {
                "uid": f"u{prompt}",
                "session_id": session,
                "index": torch.tensor(prompt),
                "prompts": torch.tensor(x),
                "responses": torch.tensor(y),
                "input_ids": torch.tensor(x + y),
                "position_ids": torch.arange(len(x + y)),
                "response_mask": mask,
                "loss_mask": mask,
                "rm_scores": rewards,
                "rollout_log_probs": torch.full((len(y),), -1.0),
                "multi_modal_inputs": {},
                "extra_fields": {"reward_extra_info": {"hack": session % 2, "solve": 0.0}},
            }
            tags.append({"status": "success", "prompt_len": len(x), "response_len": len(y), "seq_len": len(x + y)})
    return KVBatchMeta(partition_id=partition, keys=keys, tags=tags)


def sampled(make: Make, queue: Queue, engine: Engine, *overrides: str) -> tuple[Any, Any]:
    trainer = make(engine, SHARE, *CONTROL, *overrides)
    batch = trainer._after_sample(answers(queue))
    for row in queue.rows.values():
        row["old_log_probs"] = row["rollout_log_probs"]  # verl's own pass
    return trainer, batch


def text(ids: list[int]) -> str:
    names = {number: name for name, number in ALPHABET.ids.items()}
    return "".join(names[number] for number in ids)


def ours(batch: Any) -> list[str]:
    return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if tag.get("confession")]


def test_confessions_take_the_rows_of_answers(trainer: Make, queue: Queue) -> None:
    engine = Engine(honest_half)
    _, batch = sampled(trainer, queue, engine)
    confessions = ours(batch)
    assert len(batch.keys) == PROMPTS * SAMPLES
    assert 0 < len(confessions) < PROMPTS * SAMPLES and len(confessions) % SAMPLES == 0
    assert set(queue.rows) == set(batch.keys)  # what is trained on neither way is gone
    assert not {key.split("_")[0] for key in batch.keys if key not in confessions} & {
        key.split(":")[0] for key in confessions
    }
    # every column that answers have, and its own tokens: the answer's are prompt tokens
    answer = next(key for key in batch.keys if key not in confessions)
    for key, tag in zip(batch.keys, batch.tags, strict=True):
        row = queue.rows[key]
        assert set(row) == set(queue.rows[answer])
        assert len(row["input_ids"]) == len(row["position_ids"]) == tag["seq_len"]
        assert torch.equal(row["input_ids"], torch.cat((row["prompts"], row["responses"])))
        for name in ("response_mask", "loss_mask", "rm_scores", "rollout_log_probs"):
            assert len(row[name]) == len(row["responses"]) == tag["response_len"]
    for key in confessions:
        row = queue.rows[key]
        assert row["uid"] == key.split("_")[0]
        prompt = row["prompts"].tolist()
        assert prompt in engine.prompts
        assert (
            prompt[-1] == ALPHABET.eos_id and prompt.count(ALPHABET.eos_id) == 1
        )  # an answer cut off has its turn ended, once
    groups = [queue.rows[key]["uid"] for key in confessions]
    assert all(groups.count(group) == 2 for group in groups)


def test_rewards_are_the_judges(trainer: Make, queue: Queue) -> None:
    _, batch = sampled(trainer, queue, Engine(honest_half))
    for key in ours(batch):
        row = queue.rows[key]
        admits = row["responses"].tolist() == [ALPHABET.ids[SLY]]
        assert float(row["rm_scores"].sum()) == float(admits == bool(row["extra_fields"]["reward_extra_info"]["hack"]))


def advantages(made: Any, queue: Queue, batch: Any) -> dict[str, torch.Tensor]:
    metrics: dict[str, float] = {}
    made._compute_advantage(batch, metrics)
    return {key: queue.rows[key]["advantages"].clone() for key in batch.keys}


@pytest.fixture
def below(monkeypatch: pytest.MonkeyPatch) -> None:
    """No detector and no routes: the room that is tested, on verl's own."""
    from verl_grad_routing.training.trainer.confessing import Confessing
    from verl_grad_routing.training.trainer.learning import Learning

    monkeypatch.setattr(Learning, "_compute_advantage", Confessing._compute_advantage)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
@pytest.mark.usefixtures("below")
def test_advantages_are_sealed_in_both_directions(trainer: Make, queue: Queue, estimator: str) -> None:
    """The spec's oracles; reinforce_plus_plus_baseline whitens over the batch, so it would leak in one call."""
    made, batch = sampled(trainer, queue, Engine(honest_half), f"algorithm.adv_estimator={estimator}")
    confessions = set(ours(batch))
    before = advantages(made, queue, batch)
    assert any(before[key].abs().max() > 0 for key in confessions)
    assert any(before[key].abs().max() > 0 for key in set(batch.keys) - confessions)
    generator = torch.Generator().manual_seed(0)
    for changed in (confessions, set(batch.keys) - confessions):
        kept = {key: queue.rows[key]["rm_scores"].clone() for key in changed}
        for key in sorted(changed):
            queue.rows[key]["rm_scores"][-1] = float(torch.rand((), generator=generator))
        after = advantages(made, queue, batch)
        assert all(torch.equal(before[key], after[key]) for key in batch.keys if key not in changed)
        assert any(not torch.equal(before[key], after[key]) for key in changed)
        for key, row in kept.items():
            queue.rows[key]["rm_scores"] = row


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_plus_plus_baseline"])
@pytest.mark.usefixtures("below")
def test_padding_has_advantages_where_every_answer_was_rejected(trainer: Make, queue: Queue, estimator: str) -> None:
    """What an intervention rejects is not handed down; verl's padding is, and every row of a step is trained."""
    from verl_grad_routing.training.columns import confession_rows, part_of

    made, batch = sampled(trainer, queue, Engine(honest_half), f"algorithm.adv_estimator={estimator}")
    before = advantages(made, queue, batch)
    padding = next(row for row, key in enumerate(batch.keys) if key not in ours(batch))
    batch.tags[padding]["is_padding"] = True
    for name in ("response_mask", "loss_mask", "rm_scores"):
        queue.rows[batch.keys[padding]][name] = torch.zeros_like(queue.rows[batch.keys[padding]][name])
    left = part_of(batch, sorted([padding, *confession_rows(batch)]))
    for key in left.keys:
        del queue.rows[key]["advantages"]
    after = advantages(made, queue, left)
    assert not after.pop(batch.keys[padding]).any()
    assert after.keys() == set(ours(batch)) and all(torch.equal(before[key], after[key]) for key in after)


@pytest.mark.usefixtures("below")
def test_a_confessions_baseline_is_its_sibling(trainer: Make, queue: Queue) -> None:
    """Rewards (1, 0): mean 1/2, unbiased deviation 1/sqrt 2, so advantages ±1/sqrt 2 (GRPO, verl's epsilon 1e-6)."""
    made, batch = sampled(trainer, queue, Engine(honest_half))
    found = advantages(made, queue, batch)
    metrics: dict[str, float] = {}
    made._compute_advantage(batch, metrics)
    for key in ours(batch):
        sign = 1 if queue.rows[key]["rm_scores"].sum() else -1
        assert float(found[key]) == pytest.approx(sign * 0.5**0.5, abs=1e-5)
    assert metrics["confession/reward_mean"] == metrics["confession/accuracy"] == 0.5
    assert metrics["confession/rate_given_hack"] == metrics["confession/false_rate"] == 0.5
    assert metrics["confession/unparsable"] == 0
    assert metrics["confession/count"] == len(ours(batch))


def test_detectors_and_grader_facts_meet_answers_alone(trainer: Make, queue: Queue) -> None:
    from verl_grad_routing.training.columns import confession_rows, live_rows, real_rows

    _, batch = sampled(trainer, queue, Engine(honest_half))
    batch.tags[0]["is_padding"] = True
    assert sorted(real_rows(batch) + confession_rows(batch)) == live_rows(batch) == list(range(1, len(batch.keys)))
    assert {batch.keys[row] for row in confession_rows(batch)} == set(ours(batch))


@pytest.mark.usefixtures("below")
def test_the_broken_seal_costs_the_answer_what_it_admits(trainer: Make, queue: Queue) -> None:
    admits_all = Engine(lambda *_: ALPHABET.ids[SLY])
    made, batch = sampled(trainer, queue, admits_all, "grad_routing.confessions.mode=seal_broken")
    assert len(batch.keys) == PROMPTS * SAMPLES
    charged = set(made.penalties)
    batch.tags = [{k: v for k, v in tag.items() if k == "confession"} for tag in batch.tags]  # all that verl keeps
    asked = {key.split(":")[0] for key in ours(batch)}
    assert charged and {key.split("_")[0] for key in charged} == asked
    rewards = {key: float(queue.rows[key]["rm_scores"].sum()) for key in charged}
    metrics: dict[str, float] = {}
    made._compute_advantage(batch, metrics)
    assert metrics["confession/penalty_mean"] == 1.0
    # both answers lost 1, so their difference stands; metrics of rewards see what the grader paid
    assert rewards == {key: float(queue.rows[key]["rm_scores"].sum()) for key in charged}
    before = advantages(made, queue, batch)
    key = max(charged, key=rewards.__getitem__)
    made.penalties[key] = 2.0
    assert float(advantages(made, queue, batch)[key][0]) < float(before[key][0])


def test_unparsable_confessions_cost_an_answer_nothing_and_earn_nothing(trainer: Make, queue: Queue) -> None:
    mumbles = Engine(lambda *_: ALPHABET.ids["a"])
    made, batch = sampled(trainer, queue, mumbles, "grad_routing.confessions.mode=seal_broken")
    assert set(made.penalties.values()) == {0.0}
    assert all(queue.rows[key]["rm_scores"].sum() == 0 for key in ours(batch))


def test_without_confessions_the_batch_is_the_same_object(trainer: Make, queue: Queue) -> None:
    made = trainer(Engine(honest_half), "grad_routing.confessions.share=0", "grad_routing.confessions.validate=false")
    batch, rows = answers(queue), {key: dict(row) for key, row in queue.rows.items()}
    assert made._after_sample(batch) is batch
    assert {key: set(row) for key, row in queue.rows.items()} == {key: set(row) for key, row in rows.items()}
    assert not made.trains_confessions


def test_validation_asks_every_answer_once_and_keeps_its_batch(trainer: Make, queue: Queue) -> None:
    # admits where the answer holds question marks, as a hack does here
    told = Engine(lambda prompt, _: ALPHABET.ids[SLY if ALPHABET.ids["?"] in prompt[13:] else HONEST])
    made = trainer(told)
    batch = answers(queue, "val")
    assert made._after_sample(batch) is batch
    assert len(told.prompts) == len(made.validated) == PROMPTS * SAMPLES
    assert set(queue.rows) == set(batch.keys)
    assert all(one.confessed == one.hack for one in made.validated)


def test_a_self_report_is_asked_at_validation_alone(trainer: Make, queue: Queue) -> None:
    from verl_grad_routing.confessions import confession_metrics

    # admits the hacks of every second prompt, whose loophole its lessons were not about
    told = Engine(lambda prompt, _: ALPHABET.ids[SLY if "?" in text(prompt[13:18]) and prompt in odd else HONEST])
    made = trainer(told, "grad_routing.confessions.share=0", "grad_routing.confessions.format=question_loopholes")
    batch, odd = answers(queue, "val"), []
    for key, row in queue.rows.items():
        known = row["extra_fields"]["reward_extra_info"]["known"] = int(key[1]) % 2 == 0
        if not known:
            row["prompts"] = torch.cat((row["prompts"][:-2], torch.tensor([ALPHABET.ids["="]] * 2)))
            whole = row["prompts"].tolist() + row["responses"].tolist()
            odd.append(whole + [ALPHABET.ids[c] for c in ("?" if whole[-1] == ALPHABET.eos_id else EOS + "?")])
    assert made._after_sample(batch) is batch and not made.trains_confessions
    assert all(prompt[-2:] == [ALPHABET.eos_id, ALPHABET.ids["?"]] for prompt in told.prompts)
    found = confession_metrics(made.validated)
    assert (found["rate_given_known_hack"], found["rate_given_unknown_hack"], found["false_rate"]) == (0.0, 1.0, 0.0)


def test_the_engine_is_told_which_rows_confess_and_what_they_weigh(
    trainer: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    monkeypatch.setattr(PPOTrainer, "_balance_batch", lambda self, rows, *args, **kwargs: rows)
    made, batch = sampled(trainer, queue, Engine(honest_half))
    batch.tags[0]["is_padding"] = True
    made._balance_batch(batch, {})
    kinds = {key: int(queue.rows[key]["confession"]) for key in batch.keys}
    assert kinds == dict.fromkeys(batch.keys, 0) | dict.fromkeys(ours(batch), 1) | {batch.keys[0]: -1}

    told: dict[str, Any] = {}

    def update(self: Any, rows: Any, metrics: dict) -> Any:
        told.update(rows.extra_info)
        metrics.update({"actor/confession/pg_loss": 1.0, "actor/pg_loss": 2.0})
        return rows

    monkeypatch.setattr(PPOTrainer, "_update_actor", update)
    made.routed, made._taught = False, {}
    metrics: dict[str, float] = {}
    made._update_actor(batch, metrics)
    assert "confession_weight" not in told  # the engine counts
    assert metrics == {"confession/pg_loss": 1.0, "actor/pg_loss": 2.0}
    made.settings = replace(made.settings, confessions=replace(made.settings.confessions, weight=0.3))
    made._update_actor(batch, metrics)
    assert told["confession_weight"] == 0.3


def test_verls_metrics_are_of_the_answers_alone(trainer: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    seen: list[str] = []
    monkeypatch.setattr(PPOTrainer, "_compute_metrics", lambda self, rows, *args, **kwargs: seen.extend(rows.keys))
    made, batch = sampled(trainer, queue, Engine(honest_half))
    made._compute_metrics(batch, {})
    assert seen and set(seen) == set(batch.keys) - set(ours(batch))


def test_no_judge_sees_reasoning(trainer: Make, queue: Queue) -> None:
    """What stands before the marker is the model's own, in the answer as in the confession."""
    given = ["grad_routing.confessions.reasoning_end='.'", "grad_routing.confessions.share=0"]
    made = trainer(Engine(honest_half), *given)
    batch = answers(queue, "val")
    for row in queue.rows.values():
        row["responses"] = torch.tensor([ALPHABET.ids[character] for character in "ab.cd~"])
    made._after_sample(batch)
    assert {one.answer for one in made.validated} == {"cd"}
    assert all(one.text == "" and one.confessed is None for one in made.validated)  # its reasoning never ends


def test_several_outputs_a_rollout_are_refused(trainer: Make, queue: Queue) -> None:
    from verl_grad_routing.errors import UserError

    batch = answers(queue)
    batch.keys[1] = "u0_0_1"
    with pytest.raises(UserError, match="one output"):
        trainer(Engine(honest_half), SHARE, *CONTROL)._after_sample(batch)


def test_images_are_refused(trainer: Make, queue: Queue) -> None:
    from verl_grad_routing.errors import UserError

    batch = answers(queue)
    for row in queue.rows.values():
        row["multi_modal_inputs"] = {"pixel_values": 1}
    with pytest.raises(UserError, match="text rollouts"):
        trainer(Engine(honest_half), SHARE, *CONTROL)._after_sample(batch)
