"""Monitors under pressure: rates at the end of training by hand, and the table and figure of a grid."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.compare.test_grid_report import cell_of
from verl_grad_routing.compare import results as results_module
from verl_grad_routing.compare.grid import load_grid
from verl_grad_routing.compare.obfuscation import hidden, obfuscation_table, pressure_of, tail_mean
from verl_grad_routing.compare.results import load_results, write_finished
from verl_grad_routing.compare.runs import load_run

ARMS = ["penalty-pressure-100", "monitor_route", "penalty-pressure-025", "penalty-pressure-000"]
# recall of the training's monitor at the end; the held-out one sees everything
RECALL = {"penalty-pressure-000": 0.9, "penalty-pressure-025": 0.5, "penalty-pressure-100": 0.0, "monitor_route": 0.8}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("penalty-pressure-050", ("penalty", 0.5)),
        ("a-b-pressure-200", ("a-b", 2.0)),
        ("monitor_route", ("monitor_route", None)),
        ("x-pressure-", ("x-pressure-", None)),
    ],
)
def test_names_tell_pressures(name: str, told: tuple[str, float | None]) -> None:
    assert pressure_of(name) == told


@pytest.fixture
def results(make_run, write_grid, tmp_path: Path) -> Path:
    arms = [{"name": name, "preset": "monitor_penalty"} for name in ARMS]
    grid = load_grid(write_grid(arms=arms, seeds=[0, 1], reference=ARMS[0], steps=10))
    folder = tmp_path / "results"
    results_module.write_grid(folder, grid)
    for arm in ARMS:
        for seed in (0, 1):
            read = load_run(make_run(f"{arm}-{seed}", "monitor_penalty", seed, end=64))
            for step, row in read.rows.items():
                if step:  # hacking rises to 1 in ten steps; step 10 has no recall in seed 1
                    row["detector/recall"] = math.nan if (step, seed) == (10, 1) else RECALL[arm]
                    row["monitor/heldout/rate"], row["monitor/heldout/recall"] = row["hack/rate"], 1.0
                    row["detector/share_flagged"] = row["hack/rate"] * RECALL[arm]
            record = replace(read.record, detector="monitor", code="c0de", versions={})
            write_finished(folder, cell_of(arm, seed, tmp_path), replace(read, record=record))
    return folder


def test_the_end_of_training_by_hand(results: Path) -> None:
    found = {run.name: run for run in load_results(results).runs}
    run, without = (found[f"toy.penalty-pressure-025.seed-{seed}"] for seed in (0, 1))
    assert tail_mean(run, "hack/rate") == pytest.approx(0.95)  # the last fifth: steps 9 and 10
    assert tail_mean(without, "detector/recall") == 0.5  # a step without a number is left out
    assert math.isnan(tail_mean(run, "no/such"))
    assert hidden(run) == pytest.approx(0.95 * 0.5)


def test_what_was_seen_early_is_not_the_end(results: Path) -> None:
    """Recall is no number in a step without hacks: where hacking stopped, the last recalls are old ones."""
    run = next(run for run in load_results(results).runs if run.name == "toy.penalty-pressure-025.seed-0")
    rows = {
        step: {k: v for k, v in row.items() if k != "detector/recall" or step < 5} for step, row in run.rows.items()
    }
    stopped = replace(run, rows={step: row | ({"hack/rate": 0.0} if step >= 5 else {}) for step, row in rows.items()})
    assert math.isnan(tail_mean(stopped, "detector/recall"))
    assert tail_mean(stopped, "hack/rate") == hidden(stopped) == 0.0
    late = {
        9: {"hack/rate": 0.0},
        10: {"hack/rate": 0.4, "detector/recall": 0.25},
    }  # step by step: (0 + 0.4 * 0.75) / 2
    assert hidden(replace(run, rows=rows | late)) == pytest.approx(0.15)


def test_the_table_has_a_row_a_pressure_in_order(results: Path) -> None:
    table = obfuscation_table(load_results(results), "toy")
    assert table is not None
    assert [row[:2] for row in table.rows] == [
        ["penalty", "0"], ["penalty", "0.25"], ["penalty", "1"], ["monitor_route", "–"],
    ]  # fmt: skip
    columns = dict(zip(table.header, zip(*table.rows, strict=True), strict=True))
    assert [cell.split()[0] for cell in columns["monitor's recall"]] == ["0.90", "0.50", "0.00", "0.80"]
    assert [cell.split()[0] for cell in columns["held-out recall"]] == ["1.00"] * 4
    hid = [float(cell.split()[0]) for cell in columns["hidden"]]
    # seed 0 from steps 9 and 10, seed 1, which has no recall in step 10, from step 9: 0.925 (1 - recall)
    assert hid == pytest.approx([0.0925, 0.4625, 0.925, 0.185], abs=0.0051)


def test_the_report_shows_it(results: Path, tmp_path: Path) -> None:
    report = pytest.importorskip("verl_grad_routing.compare.report", reason="needs matplotlib")
    text = report.write_report([results], tmp_path / "page").read_text()
    assert "monitors under pressure" in text
    assert (tmp_path / "page" / "figures" / "toy-monitors-under-pressure.svg").is_file()


def test_a_grid_without_pressures_has_no_such_table(make_run, write_grid, tmp_path: Path) -> None:
    grid = load_grid(write_grid(arms=["off"], seeds=[0], steps=10))
    results_module.write_grid(tmp_path / "results", grid)
    read = load_run(make_run("off-0", "off", 0))
    record = replace(read.record, detector="constant", code="c0de", versions={})
    write_finished(tmp_path / "results", cell_of("off", 0, tmp_path), replace(read, record=record))
    assert obfuscation_table(load_results(tmp_path / "results"), "toy") is None
