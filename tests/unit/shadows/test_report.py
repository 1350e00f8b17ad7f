"""Shadows in the report: one figure, one table, nothing where a run has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from verl_grad_routing.compare.runs import load_run

shadow_report = pytest.importorskip("verl_grad_routing.compare.shadow_report", reason="needs matplotlib")


@pytest.fixture
def watched(make_run: Any) -> Path:
    folder = make_run("persona", ablates=True)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (1, 2, 3):
            data = {"compare/arm/advantage_mass_discarded": 0.5, "compare/grift/auroc": 0.6 if step > 1 else None}
            data |= {f"compare/{name}/score_correlation": 0.1 * step for name in ("grift", "random_1")}
            data |= {"compare/random_1/gradient_cosine_deployed": -0.25} if step == 2 else {}
            file.write(json.dumps({"step": step, "data": data}) + "\n")
    return folder


def test_the_table_has_means_over_steps(watched: Path, make_run: Any) -> None:
    runs = [load_run(watched), load_run(make_run("off"))]
    table = shadow_report.shadow_table(runs)
    rows = {(row[0], row[1]): dict(zip(table.header[2:], row[2:], strict=True)) for row in table.rows}
    assert list(rows) == [("persona", "the run's own"), ("persona", "grift"), ("persona", "random_1")]
    assert rows["persona", "grift"]["rank correlation"] == "0.2" and rows["persona", "grift"]["AUROC"] == "0.6"
    assert rows["persona", "random_1"]["gradient cosine, deployed"] == "-0.25"
    own = rows["persona", "the run's own"]
    assert (own["AUROC"], own["advantage mass discarded"], own["kappa"]) == ("0.9", "0.5", "–")


def test_the_figure_draws_what_is_there(watched: Path, make_run: Any) -> None:
    runs = [load_run(watched), load_run(make_run("off"))]
    svg = shadow_report.shadow_figure(runs)
    assert ElementTree.fromstring(svg).tag.endswith("svg") and svg == shadow_report.shadow_figure(runs)
    assert shadow_report.shadow_names(runs[0]) == ["grift", "random_1"]


def test_without_shadows_there_is_neither(make_run: Any) -> None:
    runs = [load_run(make_run("off"))]
    assert shadow_report.shadow_table(runs) is None and shadow_report.shadow_figure(runs) is None


def test_the_page_shows_both(watched: Path, make_run: Any, tmp_path: Path) -> None:
    from verl_grad_routing.compare.report import write_report

    page = write_report([watched], tmp_path / "one").read_text()
    assert "What other methods said of the same rollouts" in page and "Methods in shadow, means over steps" in page
    page = write_report([make_run("off")], tmp_path / "two").read_text()
    assert "other methods" not in page and "Methods in shadow" not in page
