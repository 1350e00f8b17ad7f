"""Figures of failure modes: their numbers are the worked cases', and the pages that route show one each."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[3] / "docs"
PAGES = (
    "bases",
    "dense",
    "era",
    "gates",
    "interventions",
    "labels",
    "measures",
    "persona",
    "persona_grad",
    "quarantine_off",
    "retain",
    "tokens",
)


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("failure_figures", DOCS / "failure_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_worked_cases(figures: ModuleType) -> None:
    """AdamW's leak, clipping and the tug of war: the numbers of the cited codes, as the pages quote them."""
    frozen = figures.frozen_block(2)
    assert frozen["gradient zeroed"][1][2] == pytest.approx(0.8132352, abs=1e-6)
    assert frozen["not stepped (freeze_inactive)"][1][1:] == pytest.approx([0.89, 0.89], abs=1e-6)
    norms, left = figures.clipping()["one norm over both"]
    assert dict(zip(norms, left, strict=True))[4.0] == pytest.approx(0.0747899, abs=1e-6)
    assert figures.clipping()["each its own (default)"][1] == pytest.approx([0.3] * 100)
    assert figures.two_blocks((1, 1, 0), 0.01, 4001)[-1] == pytest.approx((27.2289, -25.5622), abs=1e-4)
    assert figures.two_blocks((1, 1, 0.2), 0.01, 20_000)[-1] == pytest.approx((4.5, -3.0), abs=1e-9)
    _, share = figures.absorbed()["deployed block's share"]
    assert share[0] == pytest.approx(0.5) and share[-1] == 0 and share == sorted(share, reverse=True)
    rates, precision = figures.fixed_share()["routed rollouts that hack"]
    assert precision == pytest.approx([min(1, rate / 0.75) for rate in rates], abs=0.02)
    _, norms = figures.short_answers(4)["mean norm"]
    assert norms[0] > norms[2] > norms[4]
    leaked = {label: dict(zip(*curve, strict=True)) for label, curve in figures.saturation().items()}
    assert [leaked[label][0.2] for label in leaked] == pytest.approx([0.141, 0.162, 0.120, 0.126], abs=5e-4)
    assert [leaked[label][0.85] for label in leaked] == pytest.approx([1.682, 1.967, 1.397, 1.445], abs=5e-4)
    for shift, (counts, cosines) in zip((8, 4), figures.few_pairs().values(), strict=True):
        assert cosines == pytest.approx([shift / (shift**2 + 2 * 256 / pairs) ** 0.5 for pairs in counts], abs=0.03)
    (_, held_out), (_, separates) = figures.accident(8).values()
    assert held_out[0] == pytest.approx(0.86, abs=0.06) and separates[0] == pytest.approx(0.91, abs=0.03)
    assert held_out[-1] == 1 and separates[-1] == pytest.approx(0.56, abs=0.03)


def test_every_figure_is_drawn_and_shown(figures: ModuleType) -> None:
    drawn = {path.stem for path in (DOCS / "assets" / "methods").glob("*.svg")}
    shown = {page: set(re.findall(r"\(\.\./assets/methods/(\w+)\.svg\)", (DOCS / "methods" / f"{page}.md").read_text()))
             for page in PAGES}  # fmt: skip
    assert drawn == set(figures.FIGURES) == set.union(*shown.values()) and all(shown.values())
    assert all(re.search(r"(?m)^#+ (Failure modes|Known failures|Fails when)|\*Fails when", text) for text in
               ((DOCS / "methods" / f"{page}.md").read_text() for page in PAGES))  # fmt: skip
