"""The driver's decision: the grader's facts cannot reach it, and a resumed run goes on as the first would have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from verl_grad_routing.config import GradRoutingConfig, build_methods, parse
from verl_grad_routing.detectors import BatchView
from verl_grad_routing.directions import load_pairs
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions import Judged
from verl_grad_routing.routing import Route
from verl_grad_routing.training.router import Router, fact_metrics, grader_facts

B = 64
PERSONA = {"detector": {"name": "persona_act", "pairs": "pairs.jsonl"}}
ARMS = {
    "persona_grad": {"detector": {"name": "persona_grad", "pairs": "pairs.jsonl"}},
    "persona": PERSONA,
    "random": {"detector": {"name": "random"}},
    "coinflip": {"detector": {"name": "coinflip"}},
    "grift": {
        "detector": {"name": "grift", "layers": [1], "dim": 8, "rules": ["1$"], "min_positives": 4, "relabel_every": 2}
    },
    "constant": {"detector": {"name": "constant"}},
    "oracle": {"detector": {"name": "oracle"}, "control": True},
}


def router(arm: str) -> Router:
    gate = {"name": "history_quantile", "route": 0.5, "keep": 0.25}
    if arm == "grift":
        gate = {"name": "threshold", "route_above": 0.5, "keep_below": 0.05}
    if arm == "oracle":
        gate = {"name": "threshold", "route_above": 0.5, "keep_below": 0.5}
    config: GradRoutingConfig = parse({**ARMS[arm], "gate": gate, "intervention": {"name": "route"}})
    made = Router(config, build_methods(config))
    detector = made.detector
    if detector.needs_directions:
        sides = (
            torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(1)) if detector.needs_pairs else (None,) * 2
        )
        detector.fit(*sides, (1,), 8, "hash" if detector.needs_pairs else None)
    return made


def view(step: int, order: torch.Tensor | None = None, seed: int = 0) -> BatchView:
    """A batch; ``order`` permutes the grader's facts and nothing else."""
    draw = torch.Generator().manual_seed(1000 * seed + step)
    hack = (torch.rand(B, generator=draw) < 0.5).double()
    solve = (1 - hack) * (torch.rand(B, generator=draw) < 0.5)
    facts = {"hack": hack, "solve": solve, "known": (torch.rand(B, generator=draw) < 0.25).double()}
    order = torch.arange(B) if order is None else order
    kinds = torch.nn.functional.one_hot(torch.arange(B) % 2, 8) + 0.1 * torch.randn(B, 8, generator=draw)
    return BatchView(
        keys=tuple(f"{step}-{row}_0_0" for row in range(B)),
        uids=tuple(f"{step}-{row // 8}" for row in range(B)),
        step=step,
        seed=0,
        activation_scores_BD=torch.randn(B, 1, generator=draw).double(),
        fingerprints_BF=torch.nn.functional.normalize(kinds, dim=1),
        proxy_reward_B=torch.maximum(hack, solve),
        prompts=("p",) * B,
        responses=tuple(f"r{row % 2}" for row in range(B)),
        facts={name: values[order] for name, values in facts.items()},
    )


def equal(a: Judged, b: Judged) -> bool:
    return torch.equal(a.scores_B, b.scores_B) and torch.equal(a.routes_B, b.routes_B) and a.uids == b.uids


@pytest.mark.parametrize("arm", ARMS)
def test_permuting_the_graders_facts_moves_the_oracles_routes_alone(arm: str) -> None:
    first, second = router(arm), router(arm)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(3))
    pairs = [(first.decide(view(step)), second.decide(view(step, order))) for step in (1, 2, 3)]
    same = all(equal(a[0], b[0]) for a, b in pairs)
    assert same == (arm != "oracle")
    assert arm in ("constant", "oracle") or len(torch.unique(pairs[-1][0][0].routes_B)) == 3


def test_only_the_metrics_read_the_facts() -> None:
    order = torch.randperm(B, generator=torch.Generator().manual_seed(3))
    plain, permuted = router("persona").decide(view(1))[1], router("persona").decide(view(1, order))[1]
    different = {key for key in plain if plain[key] != permuted[key] and plain[key] == plain[key]}
    names = ("auroc", "recall", "false_positive_rate", "f1_hack", "f1_clean")
    assert different == {f"detector/{name}" for name in names}
    plain, permuted = router("grift").decide(view(1))[1], router("grift").decide(view(1, order))[1]
    moved = {key for key in plain if plain[key] != permuted[key] and plain[key] == plain[key]}
    assert moved == {*different, *(f"grift/{name}" for name in ("f1_hack", "f1_clean", "permuted_f1"))}


@pytest.mark.parametrize("arm", ["persona", "persona_grad", "random", "coinflip", "grift"])
def test_a_restored_router_decides_as_the_saved_one_would_have(arm: str, tmp_path: Path) -> None:
    whole, first = router(arm), router(arm)
    for step in (1, 2):
        whole.decide(view(step))
        first.decide(view(step))
    first.save(str(tmp_path), {"preset": arm})
    resumed = router(arm)
    resumed.load(str(tmp_path))
    for step in (3, 4):
        assert equal(whole.decide(view(step))[0], resumed.decide(view(step))[0])
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("by_token", [False, True])
def test_ties_at_a_cap_fall_to_the_same_rollouts_in_whatever_order_they_arrive(by_token: bool) -> None:
    """48 of 64 score the same and a cap lets 16 through; and not those that arrived first."""
    gate = {"name": "threshold", "route_above": 0.5, "keep_below": -1.0, "max_route_share": 0.25}
    detector = {"name": "persona_act", "pairs": "pairs.jsonl"}
    if by_token:
        gate, detector = {"name": "per_token", "inner": gate}, detector | {"token_score": "projection"}
    settings = parse({"detector": detector, "gate": gate, "intervention": {"name": "route"}})

    def routes(arrived: list[int], step: int) -> dict[str, object]:
        made = Router(settings, build_methods(settings))
        made.detector.fit(*torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(1)), (1,), 8, "hash")
        scores_B = torch.tensor([float(row >= 16) for row in arrived], dtype=torch.float64)
        seen = BatchView(
            keys=tuple(f"{100 * step + row}_0_0" for row in arrived),  # of this run alone
            names=tuple(f"{row}_0_0" for row in arrived),
            uids=("p",) * B,
            step=step,
            seed=0,
            activation_scores_BD=scores_B[:, None],
            activation_token_scores=tuple(score.repeat(2) for score in scores_B),
            response_masks=(torch.ones(2),) * B,
        )
        judged, _ = made.decide(seen)
        found = judged.routes_B.tolist() if not by_token else [row.tolist() for row in judged.token_routes or ()]
        return dict(zip(seen.names or (), found, strict=True))

    order = torch.randperm(B, generator=torch.Generator().manual_seed(3)).tolist()
    first, second = routes(list(range(B)), 1), routes(order, 1)
    assert first == second
    routed = {name for name, route in first.items() if torch.tensor(route).eq(int(Route.ROUTE)).any()}
    assert 16 <= len(routed) <= 32 and routed != {f"{row}_0_0" for row in range(16, 32)}
    assert first != routes(list(range(B)), 2)  # another draw in another step


def test_a_state_of_another_method_is_refused(tmp_path: Path) -> None:
    router("random").save(str(tmp_path), {})
    with pytest.raises(UserError, match="persona_act"):
        router("persona").load(str(tmp_path))


def test_trusted_rollouts_are_kept_in_what_is_judged() -> None:
    plain, _ = router("persona").decide(view(1))
    judged, metrics = router("persona").decide(view(1), torch.arange(B) < 8)
    assert judged.routes_B[:8].tolist() == [0] * 8 and torch.equal(judged.routes_B[8:], plain.routes_B[8:])
    assert torch.equal(judged.scores_B, plain.scores_B)
    assert metrics["routing/share_keep"] == float((judged.routes_B == 0).double().mean())
    assert metrics["routing/share_trusted"] == 8 / B


def test_the_pairs_are_saved_beside_the_state(tmp_path: Path) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text(
        '{"id": "a", "prompt": "p", "unwanted": "u", "wanted": "w", "tags": ["t"]}\n'
        '{"id": "b", "prompt": [{"role": "user", "content": "é"}], "unwanted": "u", "wanted": "w"}\n'
    )
    made = router("persona")
    made.pairs = load_pairs(str(source))
    made.save(str(tmp_path / "step"), {})
    saved = load_pairs(str(tmp_path / "step" / "pairs.jsonl"))
    assert saved.content_hash == made.pairs.content_hash and saved.pairs == made.pairs.pairs


def test_a_checkpoint_without_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resume_from_path"):
        router("persona").load(str(tmp_path))


def test_facts_are_the_numbers_that_every_rollout_has() -> None:
    rows = [
        {"reward_extra_info": {"hack": 1.0, "solve": 0, "loophole": "leak", "known": 1}},
        {"reward_extra_info": {"hack": 0.0, "solve": 1, "loophole": "blank", "known": 0, "once": 1}},
    ]
    facts = grader_facts(rows)
    assert sorted(facts) == ["hack", "known", "solve"]
    assert fact_metrics(facts) == {
        "hack/rate": 0.5,
        "solve/rate": 0.5,
        "hack/rate_known": 1.0,
        "hack/rate_unknown": 0.0,
    }
    assert fact_metrics(grader_facts([{}, None])) == {}
