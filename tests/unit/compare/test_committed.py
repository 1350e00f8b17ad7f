"""Committed comparisons: every table, number and page follows from the committed results, byte for byte."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from verl_grad_routing.compare.embed import embed
from verl_grad_routing.compare.grid import load_grid
from verl_grad_routing.compare.grid_report import NUMBERS, PAGE, TABLES, write_grid_report
from verl_grad_routing.compare.results import GRID, load_results, write_grid

ROOT = Path(__file__).parents[3]
COMMITTED = sorted(path.parent for path in (ROOT / "docs" / "results").glob(f"*/results/{GRID}"))
DRAWN = re.compile(r"<svg .*?</svg>", re.DOTALL)
MARK = re.compile(r"^<!-- results: (\S+) -->$", re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def named(path: Path) -> str:
    return path.parent.name


@pytest.mark.parametrize("results", COMMITTED, ids=named)
def test_tables_and_numbers_are_those_of_the_results(results: Path, tmp_path: Path) -> None:
    write_grid_report(results, tmp_path)
    committed = results.parent / "report"
    assert (tmp_path / NUMBERS).read_bytes() == (committed / NUMBERS).read_bytes()
    pages = [DRAWN.sub("", (to / PAGE).read_text(encoding="utf-8")) for to in (tmp_path, committed)]
    assert pages[0] == pages[1]  # figures aside
    made, kept = ({path.name: path.read_bytes() for path in (to / TABLES).iterdir()} for to in (tmp_path, committed))
    assert made == kept


@pytest.mark.parametrize("results", COMMITTED, ids=named)
def test_the_grid_is_the_recipe(results: Path, tmp_path: Path) -> None:
    write_grid(tmp_path, load_grid(ROOT / "recipes" / "comparison" / f"{named(results)}.yaml"))
    assert (tmp_path / GRID).read_bytes() == (results / GRID).read_bytes()


@pytest.mark.parametrize("results", COMMITTED, ids=named)
def test_every_result_is_a_cell_of_one_training_code_and_names_no_folder(results: Path) -> None:
    found = load_results(results)  # refuses mixed versions
    assert not found.extra and len({run.record.code for run in found.runs}) == 1
    assert all(run.record.revision and not run.record.revision.endswith("-dirty") for run in found.runs)
    for path in results.glob("*.json"):
        assert not re.search(r'"/|/home/|/root/|/tmp/|/work/', path.read_text()), path.name
        assert path.name == GRID or json.loads(path.read_text())["status"] in ("finished", "failed")


def test_the_figure_on_top_is_a_committed_comparisons() -> None:
    """As soon as one has all of its runs; until then it is the demo's."""
    complete = [results for results in COMMITTED if not load_results(results).unfinished()]
    figures = [path for results in complete for path in (results.parent / "report" / "figures").glob("*.svg")]
    allowed = {str(path.relative_to(ROOT)) for path in figures} or {"docs/assets/figure.svg"}
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]+\.svg)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert shown and shown <= allowed


def test_tables_in_pages_are_those_of_the_results(tmp_path: Path) -> None:
    """Every block between marks was written by ``vgr report --into``, and every comparison is on some page."""
    shown = set()
    for page in PAGES:
        for name in MARK.findall(page.read_text(encoding="utf-8")):
            shown.add(name)
            copy = tmp_path / page.name
            shutil.copy(page, copy)
            embed(ROOT / "docs" / "results" / name / "results", copy)
            assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (page, name)
    assert shown == {named(results) for results in COMMITTED}
