"""A gate's history scored again on the current direction: as if every rollout had been projected on it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from verl_grad_routing.config import build_methods, parse
from verl_grad_routing.detectors import BatchView
from verl_grad_routing.errors import UserError
from verl_grad_routing.gates import GATES
from verl_grad_routing.routing import Route
from verl_grad_routing.training.router import Router

B, L, D, WINDOW = 16, 3, 8, 40
GATES_RESCORED: dict[str, dict[str, Any]] = {
    "exponential": {"name": "exponential_quantile", "window": WINDOW, "route": 0.25, "keep": 0.25, "half_life": 20},
    "history": {"name": "history_quantile", "window": WINDOW, "route": 0.5, "keep": 0.25},
    "otsu": {"name": "otsu", "window": WINDOW, "min_between_share": 0.0, "min_bimodality": 0.0},
}
DETECTORS: dict[str, dict[str, Any]] = {
    "persona_act": {"name": "persona_act", "pairs": "pairs.jsonl", "refresh_every": 2, "score_pass": "policy"},
    "persona_grad": {"name": "persona_grad", "pairs": "pairs.jsonl", "refresh_every": 2},
    "cosine": {"name": "persona_grad", "pairs": "pairs.jsonl", "refresh_every": 2, "score": "cosine"},
}


def router(gate: dict[str, Any], detector: str = "persona_act") -> Router:
    settings = {"gate": gate, "detector": DETECTORS[detector], "intervention": {"name": "route"}}
    config = parse(settings)
    made = Router(config, build_methods(config))
    fit(made, 0)
    return made


def fit(one: Router, draw: int) -> None:
    sides = torch.randn(2, 4, L, D, generator=torch.Generator().manual_seed(100 + draw))
    one.detector.fit(*sides, tuple(range(1, L + 1)), D, "hash")


def features(step: int) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(step))


def view(one: Router, step: int, handed_over: bool = True) -> BatchView:
    features_BLd = features(step)
    return BatchView(
        keys=tuple(f"{step}-{row}_0_0" for row in range(B)),
        uids=tuple(f"{step}-{row // 4}" for row in range(B)),
        step=step,
        seed=0,
        activation_scores_BD=one.detector.projected(features_BLd),
        features_BLd=features_BLd if handed_over else None,
    )


def by_hand(gate: dict[str, Any], one: Router, steps: int) -> Tensor:
    """Routes of the last step of a gate without memory of its own: fed all batches as the direction scores them now."""
    fresh = GATES.build({key: value for key, value in gate.items() if key != "rescore"}, "gate")
    for step in range(1, steps + 1):
        seen = view(one, step)
        order = seen.tie_order()
        scores_B = one.detector.projected(features(step))[:, 0]
        routes_B = fresh.decide(scores_B[order], step).routes_B[order.argsort()]
    return routes_B


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("gate", GATES_RESCORED)
def test_thresholds_are_those_of_the_current_direction(gate: str, detector: str) -> None:
    """Five batches of 16 over a window of 40, directions changed after the second and the fourth."""
    settings = {**GATES_RESCORED[gate], "rescore": True}
    one, stale = router(settings, detector), router({**settings, "rescore": False}, detector)
    differs = False
    for step in range(1, 6):
        if step in (3, 5):
            fit(one, step), fit(stale, step)
        judged, metrics = one.decide(view(one, step))
        assert torch.equal(judged.routes_B, by_hand(settings, one, step))
        assert metrics["gate/rescored"] == {3: 2 * B, 5: WINDOW}.get(step, 0)
        without, metrics = stale.decide(view(stale, step, handed_over=False))
        assert "gate/rescored" not in metrics
        differs |= not torch.equal(without.routes_B, judged.routes_B)
        assert set(judged.routes_B.tolist()) > {int(Route.ROUTE)}
    assert differs  # the test could have told them apart


def test_the_inner_gate_of_a_hysteresis_is_scored_again() -> None:
    inner = {**GATES_RESCORED["history"], "rescore": True}
    one, plain = router({"name": "hysteresis", "inner": inner, "on": 0.0, "off": 0.0}), router(inner)
    for step in range(1, 4):
        if step == 3:
            fit(one, step), fit(plain, step)
        (judged, metrics), (expected, _) = one.decide(view(one, step)), plain.decide(view(plain, step))
        assert torch.equal(judged.routes_B, expected.routes_B)
    assert metrics["gate/rescored"] == 2 * B


@pytest.mark.parametrize("before_refresh", [True, False])
def test_a_resumed_run_scores_the_same_history_again(before_refresh: bool, tmp_path: Path) -> None:
    settings = {**GATES_RESCORED["exponential"], "rescore": True}
    one, resumed = router(settings), router(settings)
    for step in (1, 2):
        one.decide(view(one, step))
    if not before_refresh:
        fit(one, 3)  # saved between a refresh and the decision that scores the history again
    one.save(str(tmp_path), {})
    resumed.load(str(tmp_path))
    if before_refresh:
        fit(one, 3), fit(resumed, 3)
    (judged, metrics), (again, same) = one.decide(view(one, 3)), resumed.decide(view(resumed, 3))
    assert torch.equal(judged.routes_B, again.routes_B) and metrics == same
    assert metrics["gate/rescored"] == 2 * B


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_is_not_resumed_with_another_setting(saved: bool, tmp_path: Path) -> None:
    gates = [{**GATES_RESCORED["history"], "rescore": rescore} for rescore in (saved, not saved)]
    one, other = router(gates[0]), router(gates[1])
    one.decide(view(one, 1))
    one.save(str(tmp_path), {})
    with pytest.raises(UserError, match=rf"grad_routing.gate.rescore={not saved}: the checkpoint's run has {saved}"):
        other.load(str(tmp_path))


def test_memory_is_the_windows() -> None:
    one = router({**GATES_RESCORED["history"], "rescore": True})
    for step in range(1, 8):
        one.decide(view(one, step))
    kept = one.detector.buffer.features_NLd
    assert kept is not None and kept.shape == (WINDOW, L, D)
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    assert torch.equal(kept[-B:], features(7)[view(one, 7).tie_order()])


class TestBadInput:
    @pytest.mark.parametrize(
        ("gate", "key"),
        [
            ({"name": "history_quantile", "rescore": True}, "grad_routing.gate.window"),
            ({"name": "exponential_quantile", "rescore": "yes"}, "grad_routing.gate.rescore"),
            ({"name": "batch_quantile", "rescore": True}, "grad_routing.gate.rescore"),
        ],
    )
    def test_gates(self, gate: dict[str, Any], key: str) -> None:
        with pytest.raises(UserError) as caught:
            router(gate)
        assert caught.value.key == key

    def test_tokens(self) -> None:
        inner = {**GATES_RESCORED["history"], "rescore": True}
        with pytest.raises(UserError, match="tokens are not scored again"):
            router({"name": "per_token", "inner": inner})

    def test_another_number_of_scores(self) -> None:
        gate = router({**GATES_RESCORED["history"], "rescore": True}).gate
        with pytest.raises(UserError, match="give one for each of the 0 remembered"):
            gate.rescore(torch.zeros(3))

    def test_nothing_handed_over(self) -> None:
        one = router({**GATES_RESCORED["history"], "rescore": True})
        with pytest.raises(UserError, match="hand them over"):
            one.decide(view(one, 1, handed_over=False))
