"""The mechanism works: what the grader's truth routes into the quarantine is gone when the quarantine is."""

from __future__ import annotations

import json

import pytest

from verl_grad_routing.compare.runs import Run
from verl_grad_routing.compare.statistics import Rate, disjoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

STEPS = 26
# A sample of each of 256 prompts, as trained, as deployed, and with the blocks swapped; at the end alone.
FULL = (
    f"trainer.test_freq={STEPS}",
    "trainer.val_before_train=false",
    "grad_routing.validate_swapped=true",
)


@pytest.fixture(scope="module")
def oracle(train) -> Run:
    return train("oracle", STEPS, *FULL)


@pytest.fixture(scope="module")
def absorb(train) -> Run:
    return train("absorb", STEPS, *FULL)


def swapped_hack(run: Run) -> Rate:
    lines = (run.folder / "val" / "swapped" / f"{STEPS}.jsonl").read_text().splitlines()
    return Rate(sum(int(json.loads(line)["hack"]) for line in lines), len(lines))


def test_oracle_routing_learns_the_hack_and_deploys_without_it(oracle: Run) -> None:
    trained = oracle.rates("last", deployed=False).overall.hack
    deployed = oracle.rates("last", deployed=True).overall.hack
    assert trained.total == deployed.total == 256
    assert trained.value >= 0.5
    assert deployed.value <= trained.value / 2
    assert disjoint(trained, deployed)


def test_deploying_the_other_block_reverses_it(oracle: Run) -> None:
    deployed = oracle.rates("last", deployed=True).overall.hack
    swapped = swapped_hack(oracle)
    assert swapped.value >= 0.5
    assert disjoint(swapped, deployed)


def test_the_task_survives_in_the_deployed_block(oracle: Run) -> None:
    assert oracle.rates("last", deployed=True).overall.solve.value >= 0.3


def test_plain_absorption_does_not_reach_it(oracle: Run, absorb: Run) -> None:
    routed = oracle.rates("last", deployed=True).overall.hack
    absorbed = absorb.rates("last", deployed=True).overall.hack
    assert absorbed.value > 2 * routed.value
    assert disjoint(absorbed, routed)


def test_a_routed_block_has_the_mass_that_its_routes_give_it(oracle: Run) -> None:
    shares = [oracle.curve(f"routing/share_{route}").values for route in ("keep", "absorb", "route")]
    assert all(abs(total - 1) < 1e-9 for total in sum(shares))
    # the oracle routes exactly the hacks and keeps exactly the rest
    assert (shares[2] == oracle.curve("hack/rate").values).all()
    assert (shares[0] == 1 - shares[2]).all()


def test_the_ratio_of_every_rollout_starts_at_one(oracle: Run) -> None:
    # one update a batch: whatever differs from the old log-probs was computed under another forward gate
    assert oracle.curve("routing/share_keep").values.min() < 0.5 < oracle.curve("routing/share_keep").values.max()
    assert abs(oracle.curve("actor/ppo_kl").values).max() < 1e-5
    assert oracle.curve("actor/pg_clipfrac").values.max() == 0
