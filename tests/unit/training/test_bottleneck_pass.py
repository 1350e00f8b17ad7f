"""From pairs and batch to scores: what the workers are asked, under which model, and where the answers go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_grad_routing.bottleneck import Bottleneck
from verl_grad_routing.detectors import DETECTORS
from verl_grad_routing.directions import Pair, PairSet
from verl_grad_routing.errors import UserError

pytestmark = pytest.mark.timeout(180)

MODULES, RANK = ("1.q_proj", "2.q_proj"), 3
PAIRS = PairSet(tuple(Pair(str(i), f"p{i}", f"u{i}", f"w{i}") for i in range(3)), "hash", "pairs.jsonl")


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


class Tokenizer:
    """A character, a token; the end is 0."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class Workers:
    """Two ranks. Coordinates of a side: its kind and its number; scores of a rollout: its first token."""

    _dispatch_info = {"actor": [0, 1]}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked: list[TensorDict] = []
        self.placed: list[Bottleneck] = []

    def model_shape(self) -> list[dict[str, int]]:
        return [{"layers": 2, "hidden_size": 16}]

    def bottleneck_modules(self, bottleneck: Bottleneck) -> list[tuple[tuple[str, ...], torch.Tensor]]:
        self.placed.append(bottleneck)
        return [(MODULES, torch.ones(2, dtype=torch.float64))]

    def bottleneck_gradients(self, data: TensorDict) -> TensorDict:
        self.asked.append(data)
        if data["bottleneck_gradients"].vectors_DMr is not None:
            rows = [ids[:1].double() for ids in data["input_ids"].unbind()]
            return TensorDict({"bottleneck_gradients": jagged(rows)}, batch_size=[len(rows)])
        rows = []
        for side in data["responses"].unbind():
            kind, number = (1.0 if side[0] == ord("u") else 0.0), float(side[1]) - ord("0")
            rows.append(torch.tensor([kind, 0, number, 0, 2 * kind, number]))
        return TensorDict({"bottleneck_gradients": jagged(rows)}, batch_size=[len(rows)])


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch):
    """``Scoring`` with a detector of gradients, up to where a run would resume."""
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.training import fingerprint_pass
    from verl_grad_routing.training.trainer import scoring
    from verl_grad_routing.training.trainer.core import Core

    def read(batch: KVBatchMeta, *fields: str) -> Any:
        rows = [torch.full((3 + int(key[1:]),), int(key[1:])) for key in batch.keys]
        return TensorDict({field: jagged(rows) for field in fields}, batch_size=[len(rows)])

    monkeypatch.setattr(fingerprint_pass, "read", read)
    monkeypatch.setattr(scoring, "load_pairs", lambda _: PAIRS)
    monkeypatch.setattr(Core, "_load_checkpoint", lambda self: None)

    def make(name: str = "persona_grad", rescores: bool = False, **settings: Any):
        made = object.__new__(scoring.Scoring)
        pairs = {} if name == "random_grad" else {"pairs": "pairs.jsonl"}
        values = {"name": name, "rank": RANK, "targets": ["q_proj"], **pairs, **settings}
        made.detector = DETECTORS.build(values, "grad_routing.detector")
        made.router = SimpleNamespace(pairs=None, token_score=None, gate=SimpleNamespace(rescores=rescores))
        made.actor_rollout_wg, made.timing_raw, made.routed = Workers(), {}, True
        made.tokenizer, made.ref_in_actor, made.use_reference_policy = Tokenizer(), True, True
        actor = SimpleNamespace(ppo_micro_batch_size_per_gpu=2, ppo_max_token_len_per_gpu=77)
        rollout = SimpleNamespace(log_prob_use_dynamic_bsz=False, log_prob_micro_batch_size_per_gpu=5)
        made.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(actor=actor, rollout=rollout), data={})
        made._load_checkpoint()
        return made

    return make


def test_the_direction_is_that_of_the_pairs_gradients(trainer) -> None:
    made = trainer()
    assert made.actor_rollout_wg.placed == [Bottleneck((1, 2), ("q_proj",), RANK, "svd", 0)]
    (asked,) = made.actor_rollout_wg.asked
    assert asked["bottleneck_gradients"].vectors_DMr is None and asked["temperature"] == 1.0
    assert asked["ablate_quarantine"] is True and asked["no_lora_adapter"] is False
    # six sides on two ranks, micro-batches of two rows at most as in the update: three rows a rank would need 2 + 1
    assert len(asked) == 8 and asked["micro_batch_size_per_gpu"] == 2
    direction = made.detector.direction
    assert direction.layers == MODULES and direction.pairs_hash == "hash" and made.router.pairs is PAIRS
    assert torch.equal(direction.vectors_Ld, torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    assert direction.unwanted_scores_P.tolist() == [1.5] * 3 and direction.wanted_scores_P.tolist() == [0.0] * 3


def test_every_rollout_is_scored_and_no_pass_of_verls_is_read(trainer) -> None:
    made = trainer(score="cosine", score_pass="reference")
    batch = KVBatchMeta([f"k{row}" for row in range(5)], [{} for _ in range(5)], "train", None, {})
    scores_BD, features_BLd = made._gradient_scores(batch, made.readers[0])
    assert scores_BD.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]] and features_BLd is None
    asked = made.actor_rollout_wg.asked[-1]
    request = asked["bottleneck_gradients"]
    assert request.cosine and torch.equal(request.vectors_DMr, made.detector.directions_DLd)
    assert asked["no_lora_adapter"] is True and asked["ablate_quarantine"] is False
    assert made.timing_raw["gradient_scores"] > 0 and not made.readers[0].in_passes
    with made._probing(batch, "reference"):
        assert "probe" not in batch.extra_info


def test_a_gate_that_scores_its_history_again_has_the_coordinates_handed_over(trainer) -> None:
    made = trainer(rescores=True)
    batch = KVBatchMeta(["k0", "k1"], [{}, {}], "train", None, {})
    scores_BD, features_BLd = made._gradient_scores(batch, made.readers[0])
    assert made.actor_rollout_wg.asked[-1]["bottleneck_gradients"].vectors_DMr is None
    assert features_BLd is not None and features_BLd.shape == (2, 2, RANK)
    directions_MR = made.detector.directions_DLd[0]
    by_hand = [float((row * directions_MR).sum(1).mean()) for row in features_BLd]
    assert scores_BD[:, 0].tolist() == pytest.approx(by_hand) and scores_BD.dtype == torch.float64


def test_the_direction_is_taken_anew(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_grad_routing.training.trainer.sampling import Sampling

    monkeypatch.setattr(Sampling, "on_sample_end", lambda self: None)
    made = trainer(refresh_every=2)
    fits = []
    for step in range(1, 6):
        made.global_steps = step
        made.on_sample_end()
        made.on_sample_end()  # of a second sample in the same step
        fits.append(len(made.actor_rollout_wg.asked))
    assert fits == [1, 1, 2, 2, 3] and made.detector.refresh_cosine == pytest.approx(1.0)


def test_the_control_asks_for_no_pairs(trainer) -> None:
    made = trainer("random_grad")
    assert made.actor_rollout_wg.asked == [] and made.router.pairs is None
    assert made.detector.direction.vectors_Ld.shape == (2, RANK)


def test_trusted_rows_come_from_the_dataset(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_grad_routing.training.trainer import scoring

    made = trainer()
    column = [{"clean": True}, {"clean": False}, {"clean": True}]
    monkeypatch.setattr(scoring, "read", lambda batch, name: {name: column[: len(batch.keys)]})
    tags: list[dict[str, Any]] = [{}, {}, {}, {"is_padding": True}]
    batch = KVBatchMeta(["k0", "k1", "k2", "pad"], tags, "train", ["uid", "extra_info"], {})
    made.settings = SimpleNamespace(trusted_column="extra_info.clean")
    assert made._trusted(batch).tolist() == [True, False, True]
    made.settings = SimpleNamespace(trusted_column=None)
    assert made._trusted(batch) is None
    made.settings = SimpleNamespace(trusted_column="clean")
    with pytest.raises(UserError, match=r"trusted_column='clean': the dataset has no column clean; rollouts have uid"):
        made._trusted(batch)


def test_the_worker_answers_with_what_was_asked() -> None:
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.training.worker import RoutedActorRolloutRefWorker

    output = TensorDict({"bottleneck_gradients": torch.ones(2, 1), "loss": torch.zeros(2)}, batch_size=[2])
    worker: Any = SimpleNamespace(actor=SimpleNamespace(infer_batch=lambda _: output))
    call = RoutedActorRolloutRefWorker.bottleneck_gradients.__wrapped__  # type: ignore[attr-defined]
    assert list(call(worker, TensorDict({}, batch_size=[2])).keys()) == ["bottleneck_gradients"]
    worker.actor.infer_batch = lambda _: None  # not a rank that has outputs
    assert call(worker, TensorDict({}, batch_size=[2])) is None
