"""The trainer's room for shadows on a store in memory: what they would have taught, and that the batch is as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from verl_grad_routing.config import parse
from verl_grad_routing.detectors import BatchView
from verl_grad_routing.interventions import Judged
from verl_grad_routing.shadows import build_shadows
from verl_grad_routing.training.router import Router

pytestmark = pytest.mark.timeout(180)

B, PROMPTS = 8, 2
LENGTHS = [2, 3, 1, 4, 2, 2, 3, 1]
REWARDS = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
HACK = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
KEYS = [f"u{row // 4}_{row}_0" for row in range(B)]
# the second half of each group is what these shadows flag: rows 2, 3, 6, 7
RULES = {"detector": {"name": "monitor", "rules": ["late"]}, "gate": {"name": "threshold", "route_above": 0.5}}
COMPARE = [
    {"name": "screened", **RULES, "intervention": {"name": "screen", "min_kept": 1}},
    {"name": "masked", **RULES, "intervention": {"name": "mask_advantage"}},
    {"name": "routed", **RULES, "intervention": {"name": "route"}},
    {"name": "fined", **RULES, "intervention": {"name": "penalize", "penalty": 3.0}},
]


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


class Store:
    """Columns by key, as the TransferQueue holds them."""

    def __init__(self) -> None:
        self.columns: dict[str, dict[str, Any]] = {}

    def read(self, batch: KVBatchMeta, *fields: str) -> TensorDict:
        rows = {field: [self.columns[field][key].clone() for key in batch.keys] for field in fields}
        return TensorDict({field: jagged(values) for field, values in rows.items()}, batch_size=[len(batch.keys)])

    def write(self, batch: KVBatchMeta, columns: dict[str, Any]) -> KVBatchMeta:
        for name, rows in columns.items():
            self.columns.setdefault(name, {}).update(zip(batch.keys, [row.clone() for row in rows], strict=True))
        return KVBatchMeta(batch.keys, batch.tags, batch.partition_id, list(self.columns), batch.extra_info)

    def snapshot(self, *fields: str) -> dict[str, dict[str, list]]:
        return {name: {key: row.tolist() for key, row in self.columns[name].items()} for name in fields}


def group_advantages(store: Store, batch: KVBatchMeta) -> None:
    """GRPO without its scale: reward minus the group's mean, on every token that counts."""
    rewards = {key: float(store.columns["rm_scores"][key].sum()) for key in batch.keys}
    for key in batch.keys:
        group = [value for other, value in rewards.items() if other[:2] == key[:2]]
        advantage = rewards[key] - sum(group) / len(group)
        mask = store.columns["response_mask"][key]
        for name in ("advantages", "returns"):
            store.columns.setdefault(name, {})[key] = advantage * mask.float()


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch):
    import verl  # noqa: F401  (loads the plugin)
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from verl_grad_routing.training.trainer import comparing, learning
    from verl_grad_routing.training.trainer.comparing import Comparing

    store = Store()
    for module in (comparing, learning):
        monkeypatch.setattr(module, "read", store.read)
        monkeypatch.setattr(module, "write", store.write)

    def advantages(self: Any, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        group_advantages(store, batch)
        return store.write(batch, {})

    monkeypatch.setattr(PPOTrainer, "_compute_advantage", advantages)

    def make(compare: list[Any], **settings: Any) -> Any:
        made = object.__new__(Comparing)
        made.settings = parse({"compare": compare, **settings})
        made.shadows = build_shadows(made.settings)
        made.shadow_routers = {shadow.name: Router(made.settings, shadow.methods) for shadow in made.shadows}
        made._seconds, made._taught, made._old_log_probs, made._fingerprints_taken = (
            comparing.defaultdict(float),
            {},
            [],
            {},
        )
        made.config = SimpleNamespace(algorithm=SimpleNamespace(use_kl_in_reward=False))
        made.global_steps, made.timing_raw, made.routed, made.readers = 1, {}, True, []
        arm = build_shadows(parse({"compare": [{"name": "own", **RULES, "intervention": {"name": "route"}}]}))[0]
        made.detector, made.intervention = arm.methods.detector, arm.methods.intervention
        batch = KVBatchMeta(KEYS, [{} for _ in KEYS], "train", None, {})
        masks = [torch.ones(length, dtype=torch.long) for length in LENGTHS]
        scores = [torch.cat([torch.zeros(n - 1), torch.tensor([r])]) for n, r in zip(LENGTHS, REWARDS, strict=True)]
        olds = [torch.arange(n) / 10 for n in LENGTHS]
        store.write(batch, {"response_mask": masks, "loss_mask": masks, "rm_scores": scores, "old_log_probs": olds})
        return made, store, batch

    return make


def view() -> BatchView:
    texts = tuple("late" if row % 4 > 1 else "soon" for row in range(B))
    return BatchView(
        keys=tuple(KEYS),
        uids=tuple(key[:2] for key in KEYS),
        step=1,
        seed=0,
        prompts=("p",) * B,
        responses=texts,
        proxy_reward_B=torch.tensor(REWARDS),
        facts={"hack": HACK},
    )


def judged() -> Judged:
    """The run's own verdicts: rows 0 and 4, the hacks, are routed."""
    return Judged(HACK.clone(), torch.where(HACK > 0, 2, 1), view().uids)


def test_what_each_would_have_taught(trainer) -> None:
    """Advantages are ±.5 everywhere; tokens 2 3 1 4 | 2 2 3 1, so a mass of 9."""
    made, store, batch = trainer(COMPARE)
    before = store.snapshot("response_mask", "loss_mask", "rm_scores")
    metrics: dict[str, float] = {}
    made._observe(batch, view(), judged(), metrics)
    assert store.snapshot("response_mask", "loss_mask", "rm_scores") == before

    def discarded(name: str) -> float:
        return metrics[f"compare/{name}/advantage_mass_discarded"]

    # rows 0 and 4 are withheld from the deployed block: 4 of 18 tokens
    assert discarded("arm") == pytest.approx(4 / 18)
    # rows 2, 3, 6, 7 leave, 9 tokens; of those kept, rows 4 and 5 then have advantage 0: 4 tokens
    assert discarded("screened") == pytest.approx(13 / 18)
    # of the flagged, row 2 alone has a positive advantage
    assert discarded("masked") == pytest.approx(1 / 18)
    assert discarded("routed") == pytest.approx(9 / 18)
    # rewards 1 0 -2 -3 and 1 1 -3 -3: rows 1 and 2 turn (+1, -1), nothing else shrinks
    assert discarded("fined") == pytest.approx(4 / 18)
    assert metrics["compare/masked/overlap"] == 0 and metrics["compare/masked/agreement"] == pytest.approx(2 / 8)
    assert metrics["compare/masked/share_flagged"] == 0.5 and metrics["compare/masked/auroc"] == pytest.approx(1 / 6)
    assert metrics["compare/masked/seconds"] > 0 and made.timing_raw["compare"] > 0
    assert made._taught == {}  # no gradients are asked for


def test_columns_for_gradients_are_those_of_each_method(trainer) -> None:
    made, store, batch = trainer(COMPARE, compare_gradients_every=1)
    made._observe(batch, view(), judged(), {})
    assert list(made._taught) == ["arm", "screened", "masked", "routed", "fined"]
    screened, routed = made._taught["screened"], made._taught["routed"]
    assert [int(mask.sum()) for mask in screened.masks["loss_mask"]] == [2, 3, 0, 0, 2, 2, 0, 0]
    assert routed.routes_N.tolist() == [1, 1, 2, 2, 1, 1, 2, 2] and screened.routes_N.tolist() == [1] * B
    asked = {}

    def compare_gradients(meta: KVBatchMeta) -> dict[str, dict[str, float]]:
        asked.update(meta.extra_info)
        return {"metrics": {"masked/gradient_cosine": 0.5}}

    made.actor_rollout_wg = SimpleNamespace(compare_gradients=compare_gradients)
    actor = SimpleNamespace(calculate_entropy=False, entropy_coeff=0.0, ppo_mini_batch_size=2)
    made.config.actor_rollout_ref = SimpleNamespace(actor=actor, rollout=SimpleNamespace(temperature=0.7, n=4))
    assert made._compared_gradients(batch) == {"masked/gradient_cosine": 0.5}
    names = [(variant.name, variant.prefix) for variant in asked["gradient_variants"]]
    assert names[:2] == [("arm", "variant_0_"), ("screened", "variant_1_")] and asked["global_batch_size"] == 8
    assert store.columns["variant_1_loss_mask"][KEYS[2]].tolist() == [0]
    assert store.columns["variant_3_route"][KEYS[2]] == 2
    assert store.columns["variant_old_log_probs"][KEYS[1]].tolist() == pytest.approx([0, 0.1, 0.2])


def test_the_runs_own_columns_are_those_without_shadows(trainer) -> None:
    """What is learned after looking is what is learned without."""
    ends = []
    for compare in ([], COMPARE):
        made, store, batch = trainer(compare)
        made._observe(batch, view(), judged(), {})
        batch = made._advantages(batch, [1, 6], {})
        made._shaped_advantages(batch, judged(), {})
        ends.append(store.snapshot("advantages", "returns", "response_mask", "loss_mask", "rm_scores"))
    assert ends[0] == ends[1]


def test_what_shadows_draw_is_not_drawn(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, batch = trainer(COMPARE)
    detector = made.shadows[0].methods.detector
    monkeypatch.setattr(detector, "score", lambda seen: torch.rand(len(seen.keys), dtype=torch.float64))
    before = torch.get_rng_state()
    made._observe(batch, view(), judged(), {})
    assert torch.equal(torch.get_rng_state(), before)
    assert made.intervention.name == "route"  # and the run's own method is back in its place


def test_fingerprints_of_one_probe_are_taken_once(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_grad_routing.training.trainer.learning import Learning

    grift = {"rules": ["late"], "layers": [1], "dim": 4, "min_positives": 2}
    entries = [
        {"name": "some", "preset": "grift_mask", "detector": {**grift, "positive_reward": 0.0}},
        {"name": "fewer", "preset": "grift_mask", "detector": {**grift, "positive_reward": 1.0}},
        {"name": "other", "preset": "grift_mask", "detector": {**grift, "probe_seed": 1}},
    ]
    made, _, batch = trainer(entries)
    taken: list[int] = []

    def fingerprinted(self: Any, real: KVBatchMeta, seen: BatchView, detector: Any) -> BatchView:
        import dataclasses

        taken.append(detector.probe.seed)
        return dataclasses.replace(seen, fingerprints_BF=torch.randn(B, 4))

    monkeypatch.setattr(Learning, "_fingerprinted", fingerprinted)
    metrics: dict[str, float] = {}
    made._observe(batch, view(), judged(), metrics)
    assert taken == [0, 1]
    assert metrics["compare/some/fingerprinted"] == 1.0 and metrics["compare/fewer/fingerprinted"] == 0.5
    made._observe(batch, view(), judged(), {})
    assert taken == [0, 1, 0, 1]  # other weights, other gradients
