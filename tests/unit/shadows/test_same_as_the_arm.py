"""A shadow that is the run's own method says and teaches exactly what the run does, whatever the run knows of rows."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.modules.memory_queue import Queue
from tests.unit.training.test_quarantine_off_step import KEYS, ROUTE_EVEN, made
from tests.unit.training.test_quarantine_off_step import batch as batch
from tests.unit.training.test_quarantine_off_step import queue as queue
from verl_grad_routing.routing import DEFAULT, STRICT
from verl_grad_routing.shadows import build_shadows
from verl_grad_routing.training.router import Router

pytestmark = pytest.mark.timeout(180)

CLEAN = [index in (2, 3) for index in range(len(KEYS))]  # row 2 is flagged
CASES: dict[str, dict[str, Any]] = {
    "quarantine off": {},
    "trusted": {"quarantine_off_share": 0.0, "trusted_column": "clean"},
    "both": {"trusted_column": "clean"},
}


def with_itself(intervention: dict[str, Any], others: dict[str, dict[str, Any]] | None = None, **settings: Any) -> Any:
    """The driver of a run with its own method in shadow, called ``same``, and with ``others`` of its detector."""
    given = {**ROUTE_EVEN, "intervention": intervention}
    parts = {part: given[part] for part in ("detector", "gate", "intervention")}
    compare = [{"name": "same", **parts}]
    compare += [{"name": name, **parts, "intervention": other} for name, other in (others or {}).items()]
    driver = made(**settings, **parts, compare=compare, compare_gradients_every=1)
    driver.shadows = build_shadows(driver.settings)
    driver.shadow_routers = {shadow.name: Router(driver.settings, shadow.methods) for shadow in driver.shadows}
    driver._seconds, driver._taught, driver._fingerprints_taken = defaultdict(float), {}, {}
    return driver


@pytest.mark.parametrize("gate", ["sampled", "routed"])
@pytest.mark.parametrize("case", CASES)
def test_it_teaches_what_the_run_learns(case: str, gate: str, queue: Queue, batch: Any) -> None:
    for key, clean in zip(KEYS, CLEAN, strict=True):
        queue.rows[key]["clean"] = clean
    batch.fields = [*batch.fields, "clean"]
    metrics: dict[str, float] = {}
    driver = with_itself({"name": "route", "quarantine_off_gate": gate}, **CASES[case])
    driver._compute_advantage(batch, metrics)
    own = "compare/same"
    assert metrics[f"{own}/agreement"] == metrics[f"{own}/overlap"] == 1
    assert metrics[f"{own}/advantage_mass_discarded"] == metrics["compare/arm/advantage_mass_discarded"]
    for name in ("arm", "same"):
        taught = driver._taught[name]
        assert taught.tables == driver._tables()
        assert taught.routes_N.tolist() == [int(queue.rows[key]["route"]) for key in KEYS]
        for column, rows in {"advantages": taught.advantages, **taught.masks}.items():
            assert all(torch.equal(row, queue.rows[key][column]) for row, key in zip(rows, KEYS, strict=True)), column
    removed = sum(not queue.rows[key]["response_mask"].any() for key in KEYS)
    assert (removed > 0) == (gate == "sampled" and case != "trusted")


def test_workers_are_given_the_tables_of_every_method(queue: Queue, batch: Any) -> None:
    routed = {"name": "route", "strict": True, "quarantine_off_gate": "routed"}
    driver = with_itself({"name": "route"}, {"other": routed})
    asked: dict[str, Any] = {}

    def compare_gradients(rows: Any) -> dict[str, dict[str, float]]:
        asked.update(rows.extra_info)
        return {"metrics": {}}

    driver.actor_rollout_wg = SimpleNamespace(compare_gradients=compare_gradients)
    driver.config.actor_rollout_ref.merge_with(
        {"actor": {"calculate_entropy": False, "entropy_coeff": 0.0}, "rollout": {"temperature": 1.0}}
    )
    driver._compute_advantage(batch, {})
    driver._compared_gradients(batch)
    own = {"routing_table": DEFAULT, "quarantine_off_table": DEFAULT.without_quarantine()}
    other = {"routing_table": STRICT, "quarantine_off_table": STRICT}
    found = {variant.name: variant.tables for variant in asked["gradient_variants"]}
    assert found == {"arm": own, "same": own, "other": other}


def test_a_validation_of_the_quarantine_ends_its_head_start_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import verl  # noqa: F401  (loads the plugin)

    from verl_grad_routing.training.trainer.confessing import Confessing

    head_start = {"head_start_steps": 9, "head_start_until": 0.5, "head_start_measure": "swapped_reward"}
    driver = with_itself({"name": "route", **head_start}, validate_swapped=True)
    driver._exported = lambda *_: nullcontext()
    driver.config.trainer = {"test_freq": 1}
    monkeypatch.setattr(Confessing, "_validate", lambda _: {"val-core/task/reward/mean@1": 0.7})
    driver._validate()
    both = driver.intervention, driver.shadows[0].methods.intervention
    assert [intervention.head_start.reached for intervention in both] == [1, 1]
