"""What the trainer writes of routes and weights of tokens, on a store in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transfer_queue import KVBatchMeta

from tests.unit.shadows.test_comparing import Store
from verl_grad_routing.config import parse
from verl_grad_routing.interventions import INTERVENTIONS, Judged
from verl_grad_routing.routing import Route
from verl_grad_routing.token_weights import Frequencies, save_weights

pytestmark = pytest.mark.timeout(180)

K, A, R = int(Route.KEEP), int(Route.ABSORB), int(Route.ROUTE)
KEYS = ["a_0_0", "a_1_0", "b_0_0", "pad"]
TAGS = [{}, {}, {}, {"is_padding": True}]
LENGTHS = [3, 2, 1, 2]
PROMPTS = [[1, 2], [3], [1], [1]]
RESPONSES = [[0, 2, 3], [2, 2], [0], [0, 0]]
TOKENS = (torch.tensor([K, R, A]), torch.tensor([A, R]), torch.tensor([K]))
JUDGED = Judged(torch.zeros(3).double(), torch.tensor([A, R, K]), ("a", "a", "b"), token_routes=TOKENS)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``make(one_update, **intervention)``: trainer, its store, the batch, and what took a pass of its own."""
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.training.trainer import learning

    store = Store()
    monkeypatch.setattr(learning, "read", store.read)
    monkeypatch.setattr(learning, "write", store.write)

    def make(one_update: bool = True, **intervention: Any) -> Any:
        trainer = object.__new__(learning.Learning)
        trainer.settings, trainer.global_steps = parse({}), 1
        trainer.intervention = INTERVENTIONS.build({"name": "route", **intervention}, "i")
        optim = SimpleNamespace(ppo_epochs=1 if one_update else 2, ppo_mini_batch_size=4)
        actor_rollout = SimpleNamespace(actor=optim, rollout=SimpleNamespace(n=1))
        algorithm = type("Algorithm", (dict,), {"use_kl_in_reward": False})()
        trainer.config = SimpleNamespace(actor_rollout_ref=actor_rollout, algorithm=algorithm)
        batch, passes = KVBatchMeta(KEYS, TAGS, "train", None, {}), []

        def log_probs(part: KVBatchMeta, asked: dict[str, Any]) -> None:
            passes.append((part.keys, sorted(asked)))
            rows = [len(PROMPTS[KEYS.index(key)]) + LENGTHS[KEYS.index(key)] for key in part.keys]
            store.write(part, {"log_probs": [torch.full((length,), -7.0) for length in rows]})

        monkeypatch.setattr(trainer, "_log_prob_pass", log_probs, raising=False)
        monkeypatch.setattr(trainer, "_even_rows", lambda count: (2 * ((count + 1) // 2), {}), raising=False)
        columns = {"response_mask": [torch.ones(n, dtype=torch.long) for n in LENGTHS]}
        columns |= {"prompts": list(map(torch.tensor, PROMPTS)), "responses": list(map(torch.tensor, RESPONSES))}
        columns |= {"old_log_probs": [torch.full((n,), -1.0) for n in LENGTHS]}
        columns |= {"advantages": [torch.full((n,), -1.0) for n in LENGTHS]}
        store.write(batch, columns)
        return trainer, store, batch, passes

    return make


def rows(store: Store, column: str) -> list[list]:
    return [[round(x, 4) for x in store.columns[column][key].tolist()] for key in KEYS]


def test_every_row_has_routes_of_its_tokens_pad_rows_too(made: Any) -> None:
    trainer, store, batch, passes = made()
    trainer._write_routes(batch, JUDGED)
    assert rows(store, "token_route") == [[K, R, A], [A, R], [K], [A, A]]
    assert [int(store.columns["route"][key]) for key in KEYS] == [A, R, K, A]
    assert not passes and rows(store, "old_log_probs") == [[-1] * n for n in LENGTHS]  # the update sees to the ratio


def test_rollouts_with_a_kept_token_get_old_log_probs_under_their_own_gates(made: Any) -> None:
    trainer, store, batch, passes = made(one_update=False)
    trainer._write_routes(batch, JUDGED)
    assert passes == [(["a_0_0", "b_0_0"], ["routing_table"])]
    assert rows(store, "old_log_probs") == [[-7] * 3, [-1] * 2, [-7], [-1] * 2]


def test_advantages_of_kept_tokens_alone_are_clamped(made: Any) -> None:
    trainer, store, batch, _ = made()
    metrics: dict[str, float] = {}
    trainer._shaped_advantages(batch, JUDGED, metrics)
    assert rows(store, "advantages") == [[0, -1, -1], [-1, -1], [0], [-1, -1]]
    assert metrics["intervention/advantage_mass_removed"] == pytest.approx(2 / 6)


def test_without_routes_of_tokens_there_is_no_such_column(made: Any) -> None:
    trainer, store, batch, _ = made()
    trainer._write_routes(batch, Judged(JUDGED.scores_B, JUDGED.routes_B, JUDGED.uids))
    assert not {"token_route", "token_weight"} & store.columns.keys()


def test_weights_are_of_the_tokens_that_are_predicted(made: Any, tmp_path: Any) -> None:
    file = tmp_path / "w.parquet"
    forget, retain = torch.tensor([9, 0, 3, 0]), torch.tensor([0, 9, 3, 5])
    w: Tensor = save_weights(file, list("abcd"), forget, retain, Frequencies())
    trainer, store, batch, _ = made(name="cloud", token_weights=str(file))
    trainer._write_routes(batch, Judged(JUDGED.scores_B, JUDGED.routes_B, JUDGED.uids))
    wanted = [[2, 0, 2, 3, None], [2, 2, None], [0, None], [0, 0, None]]  # the ids after each position
    expected = [[1.0 if i is None else round(float(w[i]), 4) for i in row] for row in wanted]
    assert rows(store, "token_weight") == [pytest.approx(row, abs=1e-4) for row in expected]
