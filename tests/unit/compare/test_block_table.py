"""The block swap in a comparison: rates of each block alone, selectivity, the quarantine's share of the updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.compare.test_grid_report import cell_of
from verl_grad_routing.compare import results as results_module
from verl_grad_routing.compare.block_table import SHARE, block_table, selectivity, update_share
from verl_grad_routing.compare.grid import load_grid
from verl_grad_routing.compare.results import load_results, write_finished
from verl_grad_routing.compare.runs import load_run


@pytest.fixture
def results(make_run, write_grid, tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    results_module.write_grid(folder, load_grid(write_grid(arms=["off", "persona"], seeds=[0], steps=10)))
    for arm in ("off", "persona"):
        read = load_run(make_run(f"{arm}-0", arm, 0, end=64, ablates=arm == "persona", deployed=4))
        if arm == "persona":
            for step, row in read.rows.items():
                row |= {SHARE: 0.2 if step < 6 else 0.4} if step else {}
            # of two data sources, after ten steps
            read.rows[10] |= {
                "val/swapped/val-aux/loopholes/hack/mean@1": 0.9,
                "val/swapped/val-core/other/hack/mean@4": 0.5,
                "val/swapped/val-aux/loopholes/solve/mean@1": 0.125,
                "val/swapped/val-aux/loopholes/hack/std@4": 9.0,
                "val/deployed/val-aux/loopholes/hack/mean@1": 9.0,
            }
        record = replace(read.record, detector="constant", code="c0de", versions={})
        write_finished(folder, cell_of(arm, 0, tmp_path), replace(read, record=record))
    return folder


def test_selectivity_and_share_by_hand(results: Path) -> None:
    off, routed = load_results(results).of("toy")
    # 4 a type and one more hack as deployed, 110 of 256 solve
    assert selectivity(routed, "hack") == pytest.approx(0.7 - 17 / 256)
    assert selectivity(routed, "solve") == pytest.approx(110 / 256 - 0.125)
    assert update_share(routed) == pytest.approx((5 * 0.2 + 5 * 0.4) / 10)
    assert selectivity(off, "hack") is None is update_share(off)


def test_the_table_has_the_arms_that_say_something(results: Path) -> None:
    table = block_table(load_results(results), "toy")
    assert table is not None and len(table.rows) == 1
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["arm"], row["hack, both blocks"], row["hack, quarantine alone"]) == ("persona", "1.00", "0.70")
    assert (row["selectivity, hack"], row["quarantine's share of updates"]) == ("0.63", "0.30")
