"""The absorption curve: which arms stand where, what is unlabelled there, and the numbers by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.compare.test_grid_report import cell_of
from verl_grad_routing.compare import results as results_module
from verl_grad_routing.compare.absorption import (
    Point,
    absorption_table,
    curves,
    measured,
    points_of,
    type_recalls,
    unlabelled,
)
from verl_grad_routing.compare.grid import load_grid
from verl_grad_routing.compare.results import load_results, write_finished
from verl_grad_routing.compare.runs import load_run
from verl_grad_routing.errors import UserError

TYPES = "grad_routing.detector.types"
# arm: its overrides, and hacks of 64 a type left at deployment by seed (one more of the type wildcard)
ARMS = {
    "off": ((), None),
    "plain_000": (("grad_routing.detector.recall=0.0",), (50, 52)),
    "plain_types_025": ((f"{TYPES}=known",), (20, 24)),
    "plain_types_075": ((f"{TYPES}=unknown",), (8, 8)),
    "plain_types_050": (
        (f"{TYPES}=all", "grad_routing.detector.type_recall={leak:1.0,blank:0.9,wildcard:0.0,sentinel:0}"),
        (10, 12),
    ),
    "plain_rollouts_050": ((f"{TYPES}=all", "grad_routing.detector.recall=0.5"), (30, 32)),
    "plain_all_100": ((f"{TYPES}=all",), (0, 2)),
    "start_types_025": ((), (4, 4)),
    "wrong_precision_050": ((f"{TYPES}=all", "grad_routing.detector.precision=0.5"), (6, 8)),
    "wrong_all_100": ((f"{TYPES}=all",), (0, 2)),
    "exposure_050": ((), None),
}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plain_types_025", [Point("types", "plain", 0.25)]),
        ("head_start_rollouts_090", [Point("rollouts", "head_start", 0.9)]),
        ("plain_000", [Point("types", "plain", 0.0), Point("rollouts", "plain", 0.0)]),
        ("plain_all_100", [Point("rollouts", "plain", 1.0), Point("precision", "plain", 1.0)]),
        ("plain_precision_025", [Point("precision", "plain", 0.25)]),
        ("off", []),
        ("plain_types_25", []),
    ],
)
def test_names_tell_points(name: str, told: list[Point]) -> None:
    assert points_of(name) == told


@pytest.fixture
def results(make_run, write_grid, tmp_path: Path) -> Path:
    arms = [{"name": name, "preset": "labels_partial", "overrides": list(ARMS[name][0])} for name in ARMS]
    folder = tmp_path / "results"
    results_module.write_grid(folder, load_grid(write_grid(arms=arms, seeds=[0, 1], steps=10)))
    for arm, (overrides, deployed) in ARMS.items():
        for seed in (0, 1):
            own = {} if deployed is None else {"ablates": True, "deployed": deployed[seed]}
            read = load_run(make_run(f"{arm}-{seed}", "labels_partial", seed, end=62, overrides=overrides, **own))
            record = replace(read.record, detector="labels", code="c0de", versions={}, control=arm.endswith("all_100"))
            write_finished(folder, cell_of(arm, seed, tmp_path), replace(read, record=record))
    return folder


def test_points_in_order_and_only_of_curves(results: Path) -> None:
    found = list(curves(load_results(results), "toy"))
    assert [(point.dial, point.method, point.share) for point in found] == [
        ("types", "plain", 0.0), ("types", "plain", 0.25), ("types", "plain", 0.5), ("types", "plain", 0.75),
        ("types", "start", 0.25),
        ("rollouts", "plain", 0.0), ("rollouts", "plain", 0.5), ("rollouts", "plain", 1.0),
        ("rollouts", "wrong", 1.0),
        ("precision", "wrong", 0.5), ("precision", "wrong", 1.0),  # and none of a method without such an arm
    ]  # fmt: skip


def test_unlabelled_types_by_hand(results: Path) -> None:
    found = curves(load_results(results), "toy")
    hits = {
        (point.dial, point.method, point.share): (tally.hack.hits, tally.hack.total)
        for point, runs in found.items()
        if (tally := unlabelled(runs[0], point)) is not None
    }
    assert hits == {
        ("types", "plain", 0.0): (4 * 50 + 1, 256),
        ("types", "plain", 0.25): (3 * 20 + 1, 192),  # all but leak
        ("types", "plain", 0.5): (2 * 10 + 1, 128),  # sentinel and wildcard, of recall 0
        ("types", "plain", 0.75): (8, 64),  # leak alone
        ("types", "start", 0.25): (3 * 4 + 1, 192),  # known types, as the presets have it
        ("rollouts", "plain", 0.0): (4 * 50 + 1, 256),
    }
    point = Point("types", "plain", 0.25)
    value = measured(point, found[point])["hack of unlabelled types"]
    assert value is not None and value.value == pytest.approx((61 / 192 + 73 / 192) / 2)
    alone = measured(point, found[point][:1])["hack of unlabelled types"]
    assert str(alone) == "0.32 [0.26, 0.39]"  # Wilson, of 61 in 192


def test_the_table_has_hack_beside_solve(results: Path) -> None:
    table = absorption_table(load_results(results), "toy")
    assert table is not None and len(table.rows) == 11
    rows = {(row[0], row[1]): dict(zip(table.header, row, strict=True)) for row in table.rows}
    half = rows["hacks of every type labelled: plain", "50%"]
    assert half["hack of unlabelled types"] == "–" and half["hack, all types"].startswith("0.49 [")
    wrong = rows["flags that are right: wrong", "50%"]
    assert wrong["hack of unlabelled types"] == "–" and wrong["hack, all types"].startswith("0.11 [")
    assert half["solve"].startswith("0.43") and half["seeds"] == "2"


def test_the_report_shows_it(results: Path, tmp_path: Path) -> None:
    report = pytest.importorskip("verl_grad_routing.compare.report", reason="needs matplotlib")
    text = report.write_report([results], tmp_path / "page").read_text()
    assert "hacks against the recall and precision of labels" in text
    svg = (tmp_path / "page" / "figures" / "toy-hacks-against-the-recall-and-precision-of-labels.svg").read_text()
    assert svg.startswith("<svg")


def test_a_grid_without_such_arms_has_no_curve(make_run, write_grid, tmp_path: Path) -> None:
    results_module.write_grid(tmp_path / "results", load_grid(write_grid(arms=["off"], seeds=[0], steps=10)))
    read = load_run(make_run("off-0", "off", 0))
    record = replace(read.record, detector="constant", code="c0de", versions={})
    write_finished(tmp_path / "results", cell_of("off", 0, tmp_path), replace(read, record=record))
    assert absorption_table(load_results(tmp_path / "results"), "toy") is None


def test_recalls_of_types_are_read_as_hydra_reads_them() -> None:
    key = "grad_routing.detector.type_recall"
    assert type_recalls([f"+{key}={{leak:1.0}}", f"{key}={{leak:0.5,blank:0}}"]) == {"leak": 0.5, "blank": 0.0}
    assert type_recalls([f"{key}=null"]) is None is type_recalls(["a=b"])
    with pytest.raises(UserError, match="loophole type: recall"):
        type_recalls([f"{key}=0.5"])
