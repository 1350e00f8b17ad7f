"""The tables that the code tells of itself: committed as generated, complete, and the rule that a run is refused by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import verl_grad_routing.cards as cards
from verl_grad_routing.cards import card_of, check_cards, controls, method_cards
from verl_grad_routing.combinations import combinations, combinations_page
from verl_grad_routing.compare.results import is_results
from verl_grad_routing.errors import UserError
from verl_grad_routing.presets import preset_names
from verl_grad_routing.scorecard import HEADER, NOT_MEASURED, measured_costs, scorecard_page

DOCS = Path(__file__).parents[3] / "docs"
ROWS = {"persona", "cloud", "sgtm", "tdga", "confessions", "grift", "advantage_modification", "monitors", "self_report"}


def test_the_committed_table_of_combinations_is_the_generated_one() -> None:
    assert (DOCS / "methods/combinations.md").read_text() == combinations_page(), "run: vgr combinations --to FILE"


def test_the_committed_scorecard_is_the_generated_one() -> None:
    measured = sorted(folder for folder in (DOCS / "results").rglob("*") if folder.is_dir() and is_results(folder))
    assert (DOCS / "methods/scorecard.md").read_text() == scorecard_page(measured), "run: vgr scorecard ... --to FILE"


def test_pairs_that_make_no_sense_have_a_reason() -> None:
    columns, table = combinations()
    assert {"mask_advantage (soft)", "modify_reward (additive)", "route", "none", "screen"} <= set(columns)
    assert all(reason for column, reason in table["constant"].items() if column != "none")
    assert table["constant"]["none"] is None and table["grift"]["mask_advantage (soft)"] is None
    assert "not in [0, 1]" in str(table["persona_act"]["mask_advantage (soft)"])
    assert table["persona_act"]["mask_advantage (hard)"] is None


def test_every_preset_has_one_entry() -> None:
    check_cards()
    assert set(method_cards()) >= ROWS
    named = [preset for card in method_cards().values() for preset in card.shipped]
    assert sorted([*named, *(name for name in controls() if name in preset_names())]) == preset_names()
    assert card_of("grift_filter") == "grift" and card_of("random") is None


def test_a_method_without_an_entry_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "preset_names", lambda: ["persona", "brand_new"])
    with pytest.raises(UserError, match=r"method cards of preset brand_new='none'.*controls.yaml"):
        card_of("brand_new")


def test_a_card_that_leaves_out_a_signal_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = {**method_cards(), "persona": dataclasses.replace(method_cards()["persona"], signals=("none",))}
    monkeypatch.setattr(cards, "method_cards", lambda: left_out)
    with pytest.raises(UserError, match=r"cards/persona.yaml: signals.*reads pairs \(detector persona_act\)"):
        scorecard_page()
    hidden = {**method_cards(), "labels": dataclasses.replace(method_cards()["labels"], oracle="no", oracle_note="")}
    monkeypatch.setattr(cards, "method_cards", lambda: hidden)
    with pytest.raises(UserError, match=r"cards/labels.yaml: oracle='no'.*reads labels"):
        check_cards()


def test_a_row_has_every_column() -> None:
    rows = [line for line in scorecard_page().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(method_cards()) and all(line.count(" | ") == len(HEADER) - 1 for line in rows)
    assert all(line.endswith(f"{NOT_MEASURED} |") for line in rows[2:])


def test_costs_are_steps_without_generation_against_the_reference(make_run: Any, tmp_path: Path) -> None:
    """The first three steps are warm-up; then 5 - 1 s against 3 - 1 s."""
    import json

    def timed(name: str, preset: str, step: float) -> Path:
        folder = make_run(name, preset)
        lines = [{"step": n, "data": {"timing_s/step": step + 9 * (n < 4), "timing_s/gen": 1.0}} for n in range(1, 8)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    runs = [timed("a", "vanilla_2r", 3.0), timed("b", "persona", 5.0), timed("c", "random", 9.0)]
    assert measured_costs(runs) == {"persona": "2.00 (1 seed)"}
    assert measured_costs(runs[1:]) == {}
    again = [timed("d", "persona", 7.0), timed("e", "persona", 7.0)]  # of the same seed: none of its runs is left out
    assert measured_costs([*runs, *again]) == {"persona": "3.00 (1 seed)"}
    assert "| 2.00 (1 seed) |" in scorecard_page(runs)
    with pytest.raises(UserError, match="RUNS"):
        measured_costs([tmp_path / "nowhere"])
