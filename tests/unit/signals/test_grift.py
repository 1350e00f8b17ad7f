"""GRIFT's detector: scores by hand, labels, abstention, state, and the control that shows a leak."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from verl_grad_routing.config import build_methods, parse
from verl_grad_routing.detectors import DETECTORS, BatchView, checked_scores, view_for
from verl_grad_routing.detectors.evaluation import f1, f1_rates, permuted_f1, verdict_metrics
from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import GradientProbe, match, per_sample_gradients, sketch, soft_scores, two_clusters
from verl_grad_routing.interventions import INTERVENTIONS, Judged
from verl_grad_routing.training.router import Router

F = 16


def grift(**settings):
    if settings.get("label_by", "judge") == "judge":
        settings.setdefault("rules", None if "judge" in settings else ["^hack"])
    settings = {"layers": [1, 2], "dim": F, "min_positives": 4, **settings}
    return DETECTORS.build({"name": "grift", **settings}, "grad_routing.detector")


def batch(hack=20, clean=40, failed=10, step=1, spread=0.1, seed=0, **fields):
    """Hacking rollouts around one unit vector, clean ones around another, failed ones without a fingerprint."""
    generator = torch.Generator().manual_seed(seed + 100 * step)
    total = hack + clean + failed
    points = torch.zeros(total, F)
    points[:hack, 0], points[hack : hack + clean, 1] = 1, 1
    points = torch.nn.functional.normalize(points + spread * torch.randn(total, F, generator=generator), dim=1)
    points[hack + clean :] = 0
    return BatchView(
        **{
            "keys": tuple(f"{37 * row % 1000:03d}" for row in range(total)),  # in another order than the rows
            "uids": ("u",) * total,
            "step": step,
            "seed": 0,
            "fingerprints_BF": points,
            "proxy_reward_B": torch.tensor([1.0] * (hack + clean) + [0.0] * failed),
            "prompts": ("p",) * total,
            "responses": ("hack",) * hack + ("solution",) * clean + ("hack",) * failed,
            "facts": {"hack": torch.tensor([1.0] * hack + [0.0] * (clean + failed))},
            **fields,
        }
    )


def test_soft_scores_by_hand():
    clean, hacking = torch.tensor([1.0, 0]), torch.tensor([0.0, 1])
    scores = soft_scores(torch.tensor([[0.6, 0.8], [1, 0], [0, 1]]), clean, hacking)
    assert scores.tolist() == pytest.approx([0.598688, 0.119203, 0.880797], abs=1e-6)


def test_scores_are_those_of_the_two_centroids():
    detector, view = grift(), batch()
    scores = checked_scores(detector, view)
    points = view.fingerprints_BF.double()
    clean, hacking = points[20:60].mean(0), points[:20].mean(0)
    expected = soft_scores(points[:60], clean, hacking)
    torch.testing.assert_close(scores[:60], expected, rtol=1e-9, atol=1e-9)
    assert scores[:20].min() > 0.5 > scores[20:60].max() and (scores[60:] == 0).all()
    report = detector.report()
    assert report["grift/abstain"] == 0 and report["grift/silhouette"] > 0.5
    assert report["grift/smallest_cluster"] == pytest.approx(1 / 3)
    assert report["grift/fingerprinted"] == pytest.approx(60 / 70)


def test_the_order_of_the_rollouts_does_not_matter():
    view = batch(spread=0.5)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2)).tolist()

    def taken(column):
        return column[order] if isinstance(column, torch.Tensor) else tuple(column[row] for row in order)

    names = ("keys", "uids", "fingerprints_BF", "proxy_reward_B", "prompts", "responses")
    moved = dataclasses.replace(view, **{name: taken(getattr(view, name)) for name in names}, facts=None)
    scores = checked_scores(grift(min_silhouette=-1), view)
    assert torch.equal(checked_scores(grift(min_silhouette=-1), moved), scores[order])
    assert len(scores.unique()) > 50


def test_unrewarded_rollouts_are_neither_asked_for_nor_judged():
    detector, view = grift(positive_reward=0.5), batch()
    assert detector.chosen_rows(view).tolist() == [True] * 60 + [False] * 10
    points = view.fingerprints_BF.clone()
    points[60:] = torch.nn.functional.normalize(torch.ones(10, F), dim=1)  # of no account
    given = dataclasses.replace(view, fingerprints_BF=points)
    assert torch.equal(checked_scores(detector, given), checked_scores(grift(), view))


@pytest.mark.parametrize(
    ("settings", "view", "reason"),
    [
        ({"min_positives": 61}, {}, 1),
        ({}, {"hack": 0, "clean": 1}, 1),
        ({"min_silhouette": 0.99}, {}, 2),
        ({"min_cluster_share": 0.4}, {}, 3),
        ({}, {"responses": ("solution",) * 70}, 4),  # all clean by the judge: hacking has not begun
        ({}, {"responses": ("hack",) * 70}, 4),  # it cannot tell them apart
    ],
    ids=["few", "one", "one cloud", "small cluster", "all clean", "no difference"],
)
def test_abstention(settings, view, reason):
    detector = grift(**settings)
    assert (checked_scores(detector, batch(**view)) == 0).all()
    assert detector.report()["grift/abstain"] == 1 and detector.report()["grift/abstain_reason"] == reason
    assert detector.verdicts(batch(**view), torch.zeros(70)) is None


def test_mostly_hacking_clusters_are_not_a_reason_to_abstain():
    """The cluster with more clean labels is clean, even when it is mostly hacking by the judge."""
    responses = ("hack",) * 20 + tuple("hack" if row % 3 else "ok" for row in range(40)) + ("",) * 10
    detector = grift(labels_per_cluster=40)
    scores = checked_scores(detector, batch(responses=responses))
    assert detector.report()["grift/abstain"] == 0 and scores[:20].min() > 0.5


def test_fewer_than_two_fingerprints_cannot_be_clustered():
    with pytest.raises(UserError, match=r"positive rollouts=1: two clusters need at least two"):
        two_clusters(torch.ones(1, 4), 0)
    with pytest.raises(UserError, match=r"detector\.min_positives=1: give an integer of at least 2"):
        grift(min_positives=1)
    assert two_clusters(torch.ones(3, 4), 0).silhouette == 0.0


def test_judges_are_asked_about_the_nearest_alone():
    ASKED.clear()
    detector = grift(rules=None, judge=f"{__name__}:asked", labels_per_cluster=4)
    checked_scores(detector, batch())
    assert len(ASKED) == 8
    with pytest.raises(UserError, match=r"judge on rollout .*true, false or a number"):
        checked_scores(grift(rules=None, judge=f"{__name__}:wild"), batch())


ASKED: list[str] = []


def asked(prompt: str, response: str) -> bool:
    ASKED.append(response)
    return response == "hack"


def wild(prompt: str, response: str) -> float:
    return 2.0


def test_between_labellings_clusters_are_matched_to_the_last_ones():
    detector = grift(rules=None, judge=f"{__name__}:asked", relabel_every=3)
    for step, asks in ((1, True), (2, False), (3, False), (4, True)):
        ASKED.clear()
        scores = checked_scores(detector, batch(step=step, hack=30 + 5 * step, clean=20))
        assert scores[: 30 + 5 * step].min() > 0.5 > scores[30 + 5 * step : 50 + 5 * step].max()
        assert bool(ASKED) == asks


def test_match_is_the_least_costly_bijection():
    known = torch.tensor([[0.0, 0], [1, 0]])
    # row by row both are nearest to (0, 0)
    moved = torch.tensor([[0.4, 0], [0.1, 0]])
    assert match(moved, known).tolist() == [[pytest.approx(0.1), 0], [pytest.approx(0.4), 0]]


# ---- what it may see ----


def test_views():
    view = batch()
    seen = view_for(grift(), view)
    assert seen.facts is None and seen.responses is not None and seen.proxy_reward_B is not None
    centred = view_for(DETECTORS.build({"name": "constant"}, "d"), view)
    assert centred.fingerprints_BF is None and centred.responses is None and centred.proxy_reward_B is None


def test_anchors_are_the_truth_and_make_a_control():
    settings = {"name": "grift", "label_by": "gt_anchor", "layers": [1], "dim": F}
    with pytest.raises(UserError, match=r"grad_routing\.control=true"):
        build_methods(parse({"detector": settings}))
    build_methods(parse({"detector": settings, "control": True}))
    detector = grift(label_by="gt_anchor")
    view = batch(responses=("",) * 70)
    assert view_for(detector, view).facts is not None and view_for(detector, view).responses is None
    assert checked_scores(detector, view)[:20].min() > 0.5
    assert (checked_scores(grift(label_by="gt_anchor"), batch(hack=7, clean=8)) == 0).all()  # 15 of the 16 it needs
    with pytest.raises(UserError, match=r"labels_per_cluster=7: .*at least 16"):
        grift(label_by="gt_anchor", labels_per_cluster=7)


# ---- metrics ----


def test_f1_by_hand():
    flags, hack = torch.tensor([True, True, False, False, False]), torch.tensor([1.0, 0, 1, 0, 0])
    assert f1(flags, hack) == pytest.approx(0.5)
    assert f1(~flags, hack == 0) == pytest.approx(2 / 3)
    assert math.isnan(f1(flags, torch.ones(5)))
    big = torch.arange(4000) < 1000
    assert f1(big, big) == 1 and permuted_f1(big, big, seed=0) == pytest.approx(0.25, abs=0.01)
    assert verdict_metrics("grift", big, big.double(), 0)["grift/f1_clean"] == 1


def test_chance_is_the_mean_over_permuted_facts():
    hack = (torch.arange(300) < 90).double()
    flags = torch.rand(300, generator=torch.Generator().manual_seed(2)) < 0.2
    found = f1_rates(flags, hack)
    assert found["chance_f1"] == pytest.approx(permuted_f1(flags, hack, seed=0, draws=400), abs=0.005)
    assert (found["f1_hack"], found["f1_clean"]) == (f1(flags, hack), f1(~flags, hack == 0))
    assert f1_rates(torch.zeros(3), torch.tensor([1.0, 0, 0])) == {"f1_hack": 0.0, "f1_clean": 0.8, "chance_f1": 0.0}
    assert all(math.isnan(value) for value in f1_rates(flags, torch.ones(300)).values())


def test_the_router_compares_verdicts_with_the_facts():
    settings = {"name": "grift", "layers": [1], "dim": F, "rules": ["^hack"]}
    config = parse({"detector": settings, "gate": {"name": "threshold", "route_above": 0.5}})
    judged, metrics = Router(config, build_methods(config)).decide(batch())
    assert metrics["grift/f1_hack"] == metrics["grift/f1_clean"] == metrics["detector/auroc"] == 1
    assert metrics["detector/f1_hack"] == metrics["detector/f1_clean"] == 1
    assert metrics["detector/chance_f1"] == pytest.approx(2 * 20 * 20 / (70 * 40))
    assert 0.2 < metrics["grift/permuted_f1"] < 0.5  # 20 of 60
    assert metrics["grift/abstain"] == 0 and judged.flagged_B.sum() == 20
    _, metrics = Router(config, build_methods(config)).decide(batch(responses=("solution",) * 70))
    assert metrics["grift/abstain"] == 1 and "grift/f1_hack" not in metrics


def test_interventions_on_its_verdicts():
    """R = [3.5 hack, 3.5, .5, .5] with the first flagged (the arithmetic of the filter is verl's own estimator)."""
    judged = Judged(torch.tensor([0.9, 0.1, 0, 0]).double(), torch.tensor([2, 1, 1, 1]), ("u",) * 4)
    before = torch.tensor([[0.8660], [0.8660], [-0.8660], [-0.8660]])
    mask = INTERVENTIONS.build({"name": "mask_advantage"}, "i")
    assert mask.advantages(before, judged).flatten().tolist() == pytest.approx([0, 0.8660, -0.8660, -0.8660])
    screen = INTERVENTIONS.build({"name": "screen"}, "i")
    assert screen.rejected(judged).tolist() == [True, False, False, False]


# ---- the label leak of the published code, and the control that shows it ----


def fingerprint_toy(labels: torch.Tensor, redrawn: tuple[bool, bool]) -> torch.Tensor:
    """Fingerprints of random gradients with a common part; each class with its own A or projection where redrawn."""
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(1, 12, 24, generator=generator)
    found = torch.zeros(len(labels), 64)
    for row in range(len(labels)):
        full = common + 0.5 * torch.randn(1, 12, 24, generator=generator)  # gradient of the whole weight
        seeds = [int(labels[row]) + 1 if again else 0 for again in redrawn]
        A = GradientProbe((1,), rank=4, seed=seeds[0]).down_projection("m", 24)
        # one token per unit of the output: x rows and delta rows whose outer products add up to the gradient
        g = per_sample_gradients(full[0], torch.eye(12), A, [(0, 12)], 2.0)
        found[row] = sketch(g.flatten(1), GradientProbe((1,), seed=seeds[1]).projection_key("m"), 64)[0]
    return torch.nn.functional.normalize(found, dim=1)


def best_flip_f1(labels: torch.Tensor, fingerprints: torch.Tensor) -> float:
    member = two_clusters(fingerprints, 0).member_P
    return max(f1(member == flip, labels) for flip in (0, 1))


@pytest.mark.parametrize("redrawn", [(True, False), (False, True), (True, True)], ids=["A", "projection", "both"])
def test_redrawing_the_probe_per_class_leaks_the_label(redrawn):
    """Random labels say nothing about a gradient. One probe finds nothing; a probe per class finds the labels."""
    labels = (torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    assert best_flip_f1(labels, fingerprint_toy(labels, (False, False))) < 0.65
    assert best_flip_f1(labels, fingerprint_toy(labels, redrawn)) > 0.9


def test_random_labels_score_at_chance():
    generator = torch.Generator().manual_seed(0)
    view = batch(hack=100, clean=100, failed=0)
    detector = grift()
    scores = checked_scores(detector, view)
    found = [f1(scores > 0.5, (torch.rand(200, generator=generator) < 0.5).double()) for _ in range(100)]
    assert sum(found) / 100 == pytest.approx(0.5, abs=0.03)
    assert permuted_f1(scores > 0.5, view.facts["hack"], seed=1) == pytest.approx(0.5, abs=0.03)
    assert f1(scores > 0.5, view.facts["hack"]) == 1


# ---- state ----


def router(**settings):
    rules = {} if settings.get("label_by") == "centroids" else {"rules": ["^hack"]}
    config = parse({"detector": {"name": "grift", "dim": F, "num_layers": 2, **rules, **settings}})
    return Router(config, build_methods(config))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    first = router(relabel_every=100)
    first.detector.choose_layers(torch.tensor([[0.9, 0.1, 0.2, 0.8]]))
    first.decide(batch(step=1))
    first.save(str(tmp_path), {})
    return tmp_path


def test_a_resumed_run_scores_as_the_first_would_have(saved):
    resumed = router(relabel_every=100)
    resumed.load(str(saved))
    assert resumed.detector.layers == (2, 3) and resumed.detector.labelled_at == 1
    swapped = batch(step=2, responses=("solution",) * 20 + ("hack",) * 40 + ("",) * 10)
    judged, _ = resumed.decide(swapped)  # matched to the saved centroids, the judge is not asked
    assert judged.scores_B[:20].min() > 0.5 > judged.scores_B[20:60].max()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"probe_seed": 1}, "probe_seed=1: the run was started with 0"),
        ({"rank": 16}, "rank=16: the run was started with 32"),
        ({"layers": [1, 2]}, r"layers=\(1, 2\): the run was started with \(2, 3\)"),
        ({"targets": ["q_proj"]}, "targets="),
        ({"dim": 32}, "dim=32"),
    ],
)
def test_a_redrawn_probe_is_refused_on_resume(saved, settings, told):
    with pytest.raises(UserError, match=rf"grad_routing\.detector\.{told}") as caught:
        router(**settings).load(str(saved))
    assert "\n" not in str(caught.value)


def test_another_generator_is_refused_on_resume(saved, monkeypatch):
    monkeypatch.setattr(GradientProbe, "hash", property(lambda self: "another"))
    with pytest.raises(UserError, match="probe hash='another'"):
        router().load(str(saved))


def test_saved_centroids_name_the_clusters(saved):
    file = str(saved / "grad_routing.pt")
    later = router(label_by="centroids", centroids=file)
    assert later.detector.layers == (2, 3)
    assert view_for(later.detector, batch()).responses is None
    judged, _ = later.decide(batch(step=9, responses=("",) * 70))
    assert judged.scores_B[:20].min() > 0.5 > judged.scores_B[20:60].max()
    with pytest.raises(UserError, match=r"probe_seed=3: .*grad_routing\.pt was made with 0"):
        router(label_by="centroids", centroids=file, probe_seed=3)
    with pytest.raises(UserError, match=r"centroids='nowhere\.pt': no such file"):
        router(label_by="centroids", centroids="nowhere.pt")
    with pytest.raises(UserError, match=r"centroids=None: give the grad_routing\.pt"):
        router(label_by="centroids")


def test_centroids_that_the_truth_named_make_a_control(saved):
    """Who labelled goes with them, through any number of runs: the truth is not laundered by a file."""
    file = saved / "grad_routing.pt"
    assert not router(label_by="centroids", centroids=str(file)).detector.knows_everything
    state = torch.load(file, weights_only=True)
    assert state["detector"]["labelled_by"] == "judge"
    for labelled_by in ("gt_anchor", None):
        state["detector"]["labelled_by"] = labelled_by
        torch.save(state, file)
        if labelled_by is None:
            with pytest.raises(UserError, match="does not say who labelled its centroids"):
                router(label_by="centroids", centroids=str(file))
        else:
            with pytest.raises(UserError, match=r"set grad_routing\.control=true"):
                router(label_by="centroids", centroids=str(file))
            later = grift(layers=None, num_layers=2, label_by="centroids", centroids=str(file))
            assert later.knows_everything and later.state_dict()["labelled_by"] == "gt_anchor"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rules": None}, "give either rules"),
        ({"label_by": "anchors"}, "judge, centroids, gt_anchor"),
        ({"layers": [1, 1]}, "different layers"),
        ({"layers": [0]}, "at least 1"),
        ({"targets": []}, "names of linear layers"),
        ({"alpha": 0}, "positive number"),
        ({"min_cluster_share": 0.6}, "from 0 to 0.5"),
        ({"labels_per_cluster": 0}, "at least 1"),
        ({"probe_seed": None}, "integer"),
    ],
)
def test_bad_configuration_is_one_line(settings, told):
    with pytest.raises(UserError, match=r"^grad_routing\.detector\.") as caught:
        DETECTORS.build({"name": "grift", "rules": ["a"], **settings}, "grad_routing.detector")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_broken_fingerprints_are_refused():
    with pytest.raises(UserError, match="no fingerprints"):
        checked_scores(grift(), dataclasses.replace(batch(), fingerprints_BF=None))
    points = batch().fingerprints_BF.clone()
    points[3, 0] = math.nan
    with pytest.raises(UserError, match=r"fingerprint of rollout .*=nan"):
        checked_scores(grift(), dataclasses.replace(batch(), fingerprints_BF=points))
    detector = grift(layers=None)
    with pytest.raises(UserError, match="not chosen yet"):
        _ = detector.probe
    assert detector.resolve_layers(8) is None
    with pytest.raises(UserError, match="num_layers=5"):
        detector.resolve_layers(4)
    with pytest.raises(UserError, match="layers 1 to 1"):
        grift().resolve_layers(1)
