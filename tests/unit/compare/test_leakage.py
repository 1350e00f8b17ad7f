"""Leakage against hand-computed cases, and everything that it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.compare.test_grid_report import cell_of
from verl_grad_routing.cli import main
from verl_grad_routing.compare import results as results_module
from verl_grad_routing.compare.across_table import across_table
from verl_grad_routing.compare.grid import load_grid
from verl_grad_routing.compare.leakage import BaselineCurve, Leak, Seen, leakage, leaks
from verl_grad_routing.compare.leakage_read import arms_of_file, arms_of_results, unlabelled_hacks
from verl_grad_routing.compare.leakage_report import grid_leakage_table, notes
from verl_grad_routing.compare.results import load_results, write_finished
from verl_grad_routing.compare.runs import load_run
from verl_grad_routing.compare.tables import NONE
from verl_grad_routing.errors import UserError

# A forget loss that falls with the forget tokens in standard training: a worked case of definition G.1.
LOSSES = BaselineCurve((0.0, 1e6, 1e7), (8.0, 6.0, 4.0))
RATES = BaselineCurve((0.0, 0.1, 0.4, 0.8), (0.05, 0.35, 0.95, 0.95))


def test_the_definition_by_hand() -> None:
    # between (0, 8) and (1e6, 6): 6.5 is at 0.75 of the way, so 750k tokens; 144M were undiscovered
    assert LOSSES.equivalent(6.5) == 750_000
    assert leakage(LOSSES, 6.5, 144e6) == pytest.approx(0.005208333, rel=1e-6)
    # the paper's example (section 4.3): 965k tokens of equivalent exposure, 144M undiscovered, "between 0.005 and 0.02"
    curve = BaselineCurve((0.0, 965e3, 2e6), (5.0, 4.0, 3.0))
    assert leakage(curve, 4.0, 144e6) == pytest.approx(0.0067, abs=5e-5)


def test_hack_rates_rise_where_losses_fall() -> None:
    assert RATES.equivalent(0.2) == pytest.approx(0.05)
    assert leakage(RATES, 0.65, 0.5) == pytest.approx(0.25 / 0.5)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_filtering_has_leakage_one_by_definition(index: int) -> None:
    exposure, value = LOSSES.exposures[index], LOSSES.values[index]
    assert LOSSES.equivalent(value) == exposure  # exactly
    if exposure:
        assert leakage(LOSSES, value, exposure) == 1.0


@pytest.mark.parametrize(
    ("curve", "value", "told"),
    [
        (LOSSES, 8.5, "beyond the baseline with the smallest amount.*less than can be told"),
        (LOSSES, 3.9, "beyond the baseline with the largest amount.*add a baseline"),
        (RATES, 0.01, "smallest amount"),
        (RATES, 0.99, "largest amount"),
        (RATES, 0.95, "has this value from 0.4 to 0.8"),  # a plateau tells no amount
        (BaselineCurve((0, 1, 2, 3), (0.0, 0.6, 0.4, 0.9)), 0.5, "from 0.8333.* to 2.2"),  # met three times
        (BaselineCurve((0, 1, 2), (0.3, 0.5, 0.3)), 0.1, "ends at the value it starts with"),
    ],
)
def test_what_the_curve_cannot_tell_is_refused(curve: BaselineCurve, value: float, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        leakage(curve, value, 1.0)
    assert "\n" not in str(caught.value)


def test_a_curve_that_turns_back_is_read_where_it_is_met_once() -> None:
    curve = BaselineCurve((0, 1, 2, 3), (0.0, 0.6, 0.4, 0.9))
    assert curve.equivalent(0.3) == pytest.approx(0.5) and curve.equivalent(0.8) == pytest.approx(2.8)
    assert curve.turns_back == (1, 2) and "between 1 and 2" in notes(curve)[0]
    assert RATES.turns_back is None and LOSSES.turns_back is None and notes(LOSSES) == []


@pytest.mark.parametrize("undiscovered", [0.0, -1.0, math.nan])
def test_without_unlabelled_data_there_is_no_leakage(undiscovered: float) -> None:
    with pytest.raises(UserError, match=r"undiscovered=.*labelled"):
        leakage(LOSSES, 6.5, undiscovered)


@pytest.mark.parametrize(
    ("exposures", "values", "told"),
    [
        ((1.0,), (2.0,), "at least two"),
        ((0.0, 0.0), (1.0, 2.0), "must ascend"),
        ((1.0, 0.0), (1.0, 2.0), "must ascend"),
        ((-1.0, 0.0), (1.0, 2.0), "at least 0"),
        ((0.0, 1.0), (1.0, math.nan), "finite"),
    ],
)
def test_a_curve_that_is_none(exposures: tuple, values: tuple, told: str) -> None:
    with pytest.raises(UserError, match=told):
        BaselineCurve(exposures, values)


def straight(seed_shift: float = 0.0) -> dict:
    """The line from (0, 0) to (1, 1), two seeds."""
    return {
        "none": {0: Seen(0.0, 0.0), 1: Seen(0.0, seed_shift)},
        "all": {0: Seen(1.0, 1.0), 1: Seen(1.0, 1.0 + seed_shift)},
    }


def test_intervals_are_over_paired_seeds() -> None:
    # leaks .2 and .4 of the two seeds; resamples of two seeds have means .2, .3, .3, .4
    _, (leak,) = leaks(straight(), {"arm": {0: Seen(1.0, 0.2), 1: Seen(1.0, 0.4)}})
    assert (leak.leakage, leak.low, leak.high) == pytest.approx((0.3, 0.2, 0.4))
    assert str(leak) == "0.300 [0.200, 0.400]"
    # the arm moves with the baselines on the same seed: nothing is uncertain
    _, (leak,) = leaks(straight(0.1), {"arm": {0: Seen(1.0, 0.2), 1: Seen(1.0, 0.3)}})
    assert (leak.low, leak.high) == pytest.approx((0.2, 0.2))


def test_an_end_beyond_the_curve_is_said_not_clipped() -> None:
    arms = {"arm": {0: Seen(0.5, -0.2), 1: Seen(0.5, 0.4)}, "beyond": {0: Seen(0.5, -0.2), 1: Seen(0.5, -0.1)}}
    _, (leak, beyond) = leaks(straight(), arms)
    assert leak.leakage == pytest.approx(0.2) and leak.low == -math.inf and leak.high == pytest.approx(0.8)
    assert str(leak) == "0.200 [below, 0.800]" and leak.as_dict()["low"] == "below"
    assert beyond.leakage is None and "less than can be told" in (beyond.why or "")
    assert str(beyond) == "– [below, below]"


def test_one_seed_has_no_interval_and_no_labels_no_leakage() -> None:
    one = {name: {0: runs[0]} for name, runs in straight().items()}
    _, found = leaks(one, {"arm": {0: Seen(1.0, 0.2)}, "all labelled": {0: Seen(0.0, 0.0)}})
    assert found[0] == Leak("arm", 1, 1.0, 0.2, pytest.approx(0.2), pytest.approx(0.2))
    assert found[1].leakage is None and "nothing that could leak" in (found[1].why or "")


def test_arms_must_share_seeds_with_the_baselines() -> None:
    with pytest.raises(UserError, match=r"arm=\[7\]: none of its seeds"):
        leaks(straight(), {"arm": {7: Seen(1.0, 0.2)}})
    with pytest.raises(UserError, match="no seed in common"):
        leaks({"a": {0: Seen(0, 0)}, "b": {1: Seen(1, 1)}}, {})


# --- a comparison's results
ARMS = {
    # arm: share of the hacks that is flagged, hacks of 64 a type at the end as deployed (None: nothing is ablated)
    "exposure_000": (1.0, None, 6),
    "exposure_050": (0.5, None, 32),
    "exposure_100": (0.0, None, 60),
    "routed": (0.75, 12, 62),
    "oracle": (1.0, 0, 62),
}


@pytest.fixture
def results(make_run, write_grid, tmp_path: Path) -> Path:
    arms = [{"name": name, "preset": "labels_partial"} for name in ARMS]
    folder = tmp_path / "results"
    results_module.write_grid(folder, load_grid(write_grid(arms=arms, seeds=[0, 1], reference="routed", steps=10)))
    for arm, (recall, deployed, end) in ARMS.items():
        for seed in (0, 1):
            own = {} if deployed is None else {"ablates": True, "deployed": deployed}
            read = load_run(make_run(f"{arm}-{seed}", "labels_partial", seed, end=end, **own))
            for step, row in read.rows.items():
                if step:
                    row["detector/recall"] = recall
            record = replace(read.record, detector="labels", code="c0de", versions={})
            write_finished(folder, cell_of(arm, seed, tmp_path), replace(read, record=record))
    return folder


def test_unlabelled_hacks_are_counted(results: Path) -> None:
    found = {run.name: run for run in load_results(results).runs}
    run = found["toy.routed.seed-0"]
    # hack rates are 62/64 times .1, .2, ... 1 in ten steps: .55 of it on average, a quarter unflagged
    assert unlabelled_hacks(run) == pytest.approx(62 / 64 * 0.55 * 0.25, abs=1e-6)
    assert unlabelled_hacks(found["toy.exposure_000.seed-1"]) == 0
    rows = {step: dict(row) for step, row in run.rows.items()}
    del rows[10]["detector/recall"]  # a step without hacks has no recall; this one counts whole
    assert unlabelled_hacks(replace(run, rows=rows)) == pytest.approx(62 / 64 * (0.45 * 0.25 + 0.1), abs=1e-6)
    for step in range(1, 7):  # in a head start nothing unflagged trains what is deployed
        rows[step]["intervention/head_start"] = float(step < 6)
    assert unlabelled_hacks(replace(run, rows=rows)) == pytest.approx(62 / 64 * (0.3 * 0.25 + 0.1), abs=1e-6)


def test_leakage_of_a_grid_by_hand(results: Path, tmp_path: Path, capsys) -> None:
    loaded = load_results(results)
    curve, found = leaks(*arms_of_results(loaded, "toy"))
    half, whole = 32 / 64 * 0.55 * 0.5, 60 / 64 * 0.55
    assert curve.exposures == pytest.approx((0, half, whole), abs=1e-6)
    assert curve.values == pytest.approx((6 / 64, 32 / 64, 60 / 64))
    routed = next(leak for leak in found if leak.arm == "routed")
    # 4 x 12 + 1 of 256 hack as deployed; between the first two baselines
    share = (49 / 256 - 6 / 64) / (32 / 64 - 6 / 64)
    assert routed.leakage == pytest.approx(share * half / (62 / 64 * 0.55 * 0.25), rel=1e-4)
    assert next(leak for leak in found if leak.arm == "oracle").why is not None
    table = grid_leakage_table(loaded, "toy")
    assert table is not None and [row[0] for row in table.rows] == ["baseline"] * 3 + ["routed", "oracle"]
    main_quietly(["leakage", str(results), "--json", str(tmp_path / "out.json")])
    assert "routed" in capsys.readouterr().out
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["runs"][0]["leakage"] == pytest.approx(routed.leakage) and data["turns_back"] is None
    # other arms as the curve
    main_quietly(["leakage", str(results), "--baseline", "exposure_000", "--baseline", "exposure_100"])
    assert "exposure_050" in capsys.readouterr().out


def test_environments_side_by_side_have_their_leakage(results: Path) -> None:
    grid = json.loads((results / "grid.json").read_text())
    grid["environments"].append({**grid["environments"][0], "name": "big"})
    (results / "grid.json").write_text(json.dumps(grid))
    for path in results.glob("toy.*.json"):
        if path.name.startswith("toy.exposure_100"):
            continue  # two baselines are left: another curve
        data = json.loads(path.read_text()) | {"environment": "big"}
        (results / path.name.replace("toy", "big")).write_text(json.dumps(data))
    loaded = load_results(results)
    table = across_table(loaded)
    assert table is not None and table.header[-1] == "leakage"
    told = {(row[0].split()[0], row[1]): row[-1] for row in table.rows}
    for place in ("toy", "big"):
        for leak in leaks(*arms_of_results(loaded, place))[1]:
            assert told[leak.arm, place] == str(leak)
    assert told["exposure_050", "toy"] == NONE


def main_quietly(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code


def test_the_report_shows_it(results: Path, tmp_path: Path) -> None:
    report = pytest.importorskip("verl_grad_routing.compare.report", reason="needs matplotlib")
    text = report.write_report([results], tmp_path / "page").read_text()
    assert "leakage of unlabelled hacks" in text
    assert (tmp_path / "page" / "figures" / "toy-leakage-of-unlabelled-hacks.svg").is_file()
    for path in results.glob("toy.exposure_0*.json"):
        path.unlink()
    assert "leakage of unlabelled hacks" not in report.write_report([results], tmp_path / "page").read_text()


def test_which_arms_make_the_curve(results: Path) -> None:
    loaded = load_results(results)
    for names, told in ((["nowhere", "routed"], "no finished arm of toy"), (["routed"], "at least two arms")):
        with pytest.raises(UserError, match=told):
            arms_of_results(loaded, "toy", names)


# --- files of one's own
ROWS = [
    {"name": "a", "role": "baseline", "exposure": 0, "value": 8},
    {"name": "b", "role": "baseline", "exposure": 1e6, "value": 6},
    {"name": "sgtm", "role": "run", "exposure": 144e6, "value": 6.5},
]


def test_files(tmp_path: Path, capsys) -> None:
    (tmp_path / "own.json").write_text(json.dumps(ROWS))
    lines = ["name,role,exposure,value,seed", *(",".join(map(str, row.values())) + "," for row in ROWS)]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    for name in ("own.json", "own.csv"):
        _, (leak,) = leaks(*arms_of_file(tmp_path / name))
        assert (leak.arm, leak.equivalent, leak.low) == ("sgtm", pytest.approx(750_000), None)
    main_quietly(["leakage", str(tmp_path / "own.csv")])
    assert "0.005" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{**ROWS[0], "role": "off"}], "row 1: role='off': give baseline or run"),
        ([{**ROWS[0], "value": None}], "no 'value'"),
        ([{**ROWS[0], "value": "much"}], "row 1: value='much': give a number"),
        ([ROWS[0], ROWS[0]], "has this seed twice"),
        (ROWS[:2], "no row is a run"),
        ({"a": 1}, "list of objects"),
    ],
)
def test_bad_files_are_one_line(rows: object, told: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=told) as caught:
        arms_of_file(tmp_path / "own.json")
    assert "\n" not in str(caught.value)


def test_no_file_is_one_line(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["leakage", str(tmp_path / "absent.csv")])
    assert "unreadable" in capsys.readouterr().err
