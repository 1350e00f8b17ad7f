"""The pages as a reader meets them: in a browser, wide and narrow, and on paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.modules import browser
from tests.unit.compare.test_grid_report import made
from verl_grad_routing.compare.report import write_report

pytestmark = pytest.mark.timeout(300)
WIDE, NARROW, A4 = 1280, 500, 718  # no window is narrower; A4 within Chromium's margins


@pytest.fixture(params=["comparison", "runs"])
def page(request, make_run, write_grid, tmp_path: Path) -> Path:
    if request.param == "comparison":
        folders = [made(make_run, write_grid, tmp_path, (0, 1, 2))]
    else:
        folders = [make_run("off"), make_run("persona", ablates=True)]
    return Path(write_report(folders, tmp_path / "report"))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_hangs_over_the_edge_and_every_figure_is_drawn(page: Path, width: int) -> None:
    found = browser.measured(page, width)
    assert found["width"] == width and found["needed"] <= width, "the page scrolls sideways"
    assert found["figures"] and len(found["figures"]) == len(found["captions"])
    for box in found["figures"]:
        assert box["width"] > 0.6 * min(width, 900) and box["height"] > 0.15 * box["width"]
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert found["tables"] and all(box["height"] > 20 for box in found["tables"])
    assert width != WIDE or not found["cut"]
    for word in ("persona", "off", "as deployed", "Words", "Commands"):
        assert word.lower() in found["text"].lower(), word


def test_figures_have_ink_in_more_than_one_colour(page: Path) -> None:
    found = browser.measured(page, WIDE)
    image = browser.picture(page, WIDE, int(found["height"]) + 50)
    for box in found["figures"]:
        x, y, width, height = (round(box[key]) for key in ("x", "y", "width", "height"))
        part = image[y : y + height, x : x + width].reshape(-1, 3).astype(int)
        ink = part[(part < 235).any(axis=1)]
        assert len(ink) > 0.005 * len(part), "a figure is blank"
        coloured = ink[np.ptp(ink, axis=1) > 60]
        assert len(coloured) > 20, "a figure has axes and no lines"


def test_it_prints_whole(page: Path) -> None:
    assert 2 <= browser.printed(page) <= 20
    found = browser.measured(page, A4, paper=True)
    assert found["needed"] <= found["width"] and not found["cut"]
