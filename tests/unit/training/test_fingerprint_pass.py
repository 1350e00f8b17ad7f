"""From the batch to the view: which rows the workers see, with which settings, and where the answers go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_grad_routing.detectors import DETECTORS, BatchView
from verl_grad_routing.errors import UserError

pytestmark = pytest.mark.timeout(180)

REWARDS = [1.0, 0.0, 1.0, 1.0, 0.0]
LAYERS, DIM = 4, 8


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


class Workers:
    """Two ranks that answer with what they were asked."""

    _dispatch_info = {"actor": [0, 1]}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked: list[TensorDict] = []

    def model_shape(self) -> list[dict[str, int]]:
        return [{"layers": LAYERS, "hidden_size": 16}]

    def pool_activations(self, data: TensorDict) -> TensorDict:
        self.asked.append(data)
        cosines = torch.tensor([0.9, 0.2, 0.8, 0.1]).expand(len(data), LAYERS)
        return TensorDict({"activation_pooled": jagged(list(cosines))}, batch_size=[len(data)])

    def fingerprint(self, data: TensorDict) -> TensorDict:
        self.asked.append(data)
        first = torch.stack([ids[0] for ids in data["input_ids"].unbind()])
        return TensorDict(
            {"fingerprints": jagged(list(torch.nn.functional.one_hot(first, DIM).float()))}, batch_size=[len(data)]
        )


@pytest.fixture
def fingerprinted(monkeypatch: pytest.MonkeyPatch):
    """``Scoring._fingerprinted`` on five rollouts of which three are rewarded; row i's first token is i."""
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.training import fingerprint_pass
    from verl_grad_routing.training.trainer.scoring import Scoring

    images: list[dict] = []

    def read(batch: KVBatchMeta, *fields: str) -> Any:
        if fields == ("multi_modal_inputs",):
            return {"multi_modal_inputs": images or [{} for _ in batch.keys]}
        rows = [torch.full((3 + int(key[1:]),), int(key[1:])) for key in batch.keys]
        return TensorDict({field: jagged(rows) for field in fields}, batch_size=[len(rows)])

    monkeypatch.setattr(fingerprint_pass, "read", read)

    def run(dynamic: bool = False, fields: list[str] | None = None, image: dict | None = None, **settings: Any):
        images.extend([image] if image else [])
        trainer = object.__new__(Scoring)
        trainer.actor_rollout_wg, trainer.timing_raw, trainer.routed = Workers(), {}, True
        values = {"rules": ["x"], "num_layers": 2, "dim": DIM, **settings}
        trainer.detector = DETECTORS.build({"name": "grift", **values}, "grad_routing.detector")
        actor = SimpleNamespace(ppo_micro_batch_size_per_gpu=1, ppo_max_token_len_per_gpu=77)
        rollout = SimpleNamespace(log_prob_use_dynamic_bsz=dynamic, log_prob_micro_batch_size_per_gpu=3)
        trainer.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(actor=actor, rollout=rollout))
        keys = [f"k{row}" for row in range(len(REWARDS))]
        real = KVBatchMeta(keys, [{} for _ in keys], "train", fields, {})
        view = BatchView(
            keys=tuple(keys), uids=tuple(keys), step=1, seed=0, proxy_reward_B=torch.tensor(REWARDS), facts=None
        )
        return trainer, trainer._fingerprinted(real, view, trainer.detector)

    return run


def test_rewarded_rollouts_get_their_own_fingerprints(fingerprinted) -> None:
    trainer, view = fingerprinted()
    expected = torch.eye(DIM)[:5] * torch.tensor(REWARDS)[:, None]
    assert torch.equal(view.fingerprints_BF, expected)
    assert trainer.detector.layers == (2, 4) and trainer.timing_raw["fingerprint"] > 0
    cosines, asked = trainer.actor_rollout_wg.asked
    assert cosines["probe"].layers == (1, 2, 3, 4) and len(cosines) == 6 and cosines["micro_batch_size_per_gpu"] == 3
    assert asked["gradient_probe"] == trainer.detector.probe and asked["temperature"] == 1.0
    assert asked["compute_loss"] is False
    # two ranks, micro-batches of one row as in the update: a fourth row fills up
    assert [int(ids[0]) for ids in asked["input_ids"].unbind()] == [0, 2, 3, 0] and asked[
        "micro_batch_size_per_gpu"
    ] == 1


def test_layers_are_chosen_once(fingerprinted) -> None:
    trainer, _ = fingerprinted(layers=[1])
    assert trainer.detector.layers == (1,) and len(trainer.actor_rollout_wg.asked) == 1


def test_dynamic_batches_are_those_of_the_update(fingerprinted) -> None:
    trainer, view = fingerprinted(dynamic=True)
    assert trainer.actor_rollout_wg.asked[1]["max_token_len_per_gpu"] == 77
    assert (view.fingerprints_BF != 0).any(1).tolist() == [True, False, True, True, False]


def test_without_a_rewarded_rollout_no_worker_is_asked(fingerprinted) -> None:
    trainer, view = fingerprinted(layers=[1], positive_reward=2.0)
    assert not view.fingerprints_BF.any() and not trainer.actor_rollout_wg.asked


def test_images_are_refused(fingerprinted) -> None:
    fingerprinted(fields=["multi_modal_inputs"], layers=[1])  # verl writes an empty column for text
    with pytest.raises(UserError, match="only text"):
        fingerprinted(fields=["multi_modal_inputs"], layers=[1], image={"pixel_values": 1})
