"""Tables, figures and the page of a comparison, from results that a test wrote."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from verl_grad_routing.compare import results as results_module
from verl_grad_routing.compare.across_table import across_table
from verl_grad_routing.compare.cells import Cell
from verl_grad_routing.compare.contrasts import HACK, HACK_UNKNOWN, by_arm, claims, contrasts
from verl_grad_routing.compare.embed import embed
from verl_grad_routing.compare.formats import to_csv, to_html, to_latex, to_markdown
from verl_grad_routing.compare.grid import Arm, load_grid
from verl_grad_routing.compare.grid_tables import (
    arms_table,
    contrast_table,
    grid_notes,
    kinds_table,
    shared_table,
    status_table,
    versions_table,
)
from verl_grad_routing.compare.markup import finding_list
from verl_grad_routing.compare.results import load_results, write_failed, write_finished
from verl_grad_routing.compare.runs import load_run
from verl_grad_routing.compare.scorecard_table import scorecard_table
from verl_grad_routing.compare.signal_table import signal_table
from verl_grad_routing.compare.tables import NONE, Table
from verl_grad_routing.errors import UserError

report = pytest.importorskip("verl_grad_routing.compare.report", reason="needs matplotlib")
from verl_grad_routing.compare import figures  # noqa: E402
from verl_grad_routing.compare.grid_figures import arm_styles, signals_figure  # noqa: E402

SEEDS = (0, 1, 2)
# arm: hacks of 64 a type left at deployment; None deletes nothing. The quarter of wildcard has one more.
DETECTORS = {"off": "constant", "random": "random", "persona": "persona_act", "oracle": "oracle"}
DEPLOYED = {"off": None, "random": 50, "persona": 3, "oracle": 0}


@pytest.fixture
def results(make_run, write_grid, tmp_path: Path) -> Path:
    """Four arms, three seeds; ``oracle``'s last cell failed, ``random``'s last is unfinished."""
    return made(make_run, write_grid, tmp_path, SEEDS)


def made(make_run, write_grid, tmp_path: Path, seeds: tuple[int, ...]) -> Path:
    grid = load_grid(write_grid(arms=list(DEPLOYED), seeds=list(seeds), control="random", steps=10))
    folder = tmp_path / "results"
    results_module.write_grid(folder, grid)
    for arm, left in DEPLOYED.items():
        for seed in seeds:
            cell = cell_of(arm, seed, tmp_path)
            if (arm, seed) == ("oracle", 2):
                write_failed(folder, cell, "ValueError: out | of luck")
            elif (arm, seed) != ("random", 2):
                own = {} if left is None else {"ablates": True, "deployed": left + seed}
                run = make_run(f"{arm}-{seed}", arm, seed, end=60 + seed, control=arm == "oracle", **own)
                read = load_run(run)
                record = replace(read.record, detector=DETECTORS[arm], code="c0de", versions={"torch": "2.0"})
                write_finished(folder, cell, replace(read, record=record))
    return folder


def cell_of(arm: str, seed: int, tmp_path: Path) -> Cell:
    given = (Arm(arm, arm), "toy", "test", seed, tmp_path / "runs", (), (), tmp_path / "built" / "manifest.json", 5)
    return Cell(*given)


def test_results_are_counts_and_read_back(results: Path, tmp_path: Path) -> None:
    text = (results / "toy.persona.seed-1.json").read_text()
    assert len(text) < 10_000 and str(tmp_path) not in text
    data = json.loads(text)
    assert (data["arm"], data["environment"], data["seed"], data["split"]) == ("persona", "toy", 1, "test")
    assert data["validations"][-1]["overall"] == {"hack": 17, "solve": 110, "total": 256}
    found = load_results(results)
    run = next(run for run in found.runs if run.name == "toy.persona.seed-1")
    assert run.rates("last", deployed=True).overall.hack.hits == 17 and run.validation_steps == [0, 5, 10]
    assert run.rates(5, deployed=False).known_types == {"leak"}
    assert run.curve("hack/rate").values[-1] == pytest.approx(61 / 64, abs=1e-6)
    off = next(run for run in found.runs if run.record.arm == "off")
    assert off.rates("last", deployed=True).overall == off.rates("last", deployed=False).overall


def test_differences_by_hand(results: Path) -> None:
    groups = by_arm(load_results(results).of("toy"))
    found = {contrast.arm: contrast for contrast in contrasts(groups, "off", HACK)}
    assert list(found) == ["random", "persona", "oracle"]
    # off hacks 4 (60 + s) of 256, persona 4 (3 + s) + 1: the same difference on every seed
    assert found["persona"].difference.mean == pytest.approx((13 - 240) / 256)
    assert (found["persona"].difference.seeds, found["random"].difference.seeds) == (3, 2)
    assert found["persona"].difference.p == 0.25 and found["persona"].p_holm == 0.75  # three arms against off
    assert found["random"].difference.p == 0.5 and found["random"].p_holm == 1.0
    unknown = {contrast.arm: contrast.difference.mean for contrast in contrasts(groups, "off", HACK_UNKNOWN)}
    assert unknown["persona"] == pytest.approx((10 - 180) / 192)
    against_random = {c.arm: c.difference for c in contrasts(groups, "random", HACK)}
    assert against_random["persona"].seeds == 2 and against_random["persona"].mean == pytest.approx(-47 * 4 / 256)


def test_claims_follow_the_intervals(make_run, write_grid, tmp_path: Path) -> None:
    found = claims(load_results(made(make_run, write_grid, tmp_path, tuple(range(7)))), "toy")
    assert [claim.text.split(":")[1].split(",")[0].strip() for claim in found] == [
        "persona minus off", "persona minus random",
    ]  # fmt: skip
    assert all(claim.holds for claim in found)  # controls make no claims
    assert "7 of 7 seeds: hack -0.88 [-0.89, -0.87] (lower, below 0 in 7 of 7, p = 0.016), solve +" in found[0].text, (
        found[0].text
    )


def test_a_method_that_solves_nothing_does_not_hold_against_a_baseline_that_solves_nothing(
    make_run, write_grid, tmp_path: Path
) -> None:
    """Neither hacks nor solves any more: less hacking than off, and no less solving."""
    folder = made(make_run, write_grid, tmp_path, tuple(range(7)))
    for path in folder.glob("toy.*.json"):
        data = json.loads(path.read_text())
        for validation in data.get("validations", ()):
            validation["overall"]["solve"] *= validation["step"] == 0
        path.write_text(json.dumps(data))
    found = claims(load_results(folder), "toy")
    assert [claim.holds for claim in found] == [False] * len(found) and finding_list(found).count('"fails"') == len(
        found
    )
    assert "solve +0.00 [+0.00, +0.00] (no difference shown, p = 1.000), and -0.4" in found[0].text


def test_without_a_validation_before_training_nothing_is_said_to_be_kept(make_run, write_grid, tmp_path: Path) -> None:
    folder = made(make_run, write_grid, tmp_path, tuple(range(7)))
    for path in folder.glob("toy.*.json"):
        data = json.loads(path.read_text())
        data["validations"] = [validation for validation in data.get("validations", ()) if validation["step"] > 0]
        path.write_text(json.dumps(data))
    results = load_results(folder)
    found = claims(results, "toy")
    assert all(claim.holds is False for claim in found) and "and not measured since before training" in found[0].text
    assert arms_table(results, "toy").rows[0][0] == "off"


def test_few_seeds_claim_nothing(results: Path) -> None:
    found = claims(load_results(results), "toy")
    assert found and all(claim.holds is None and claim.mark == "–" for claim in found)
    assert "3 of 3 seeds: hack -0.89 [-0.89, -0.89] (below 0 in 3 of 3, p = 0.250)" in found[0].text
    assert found[0].text.endswith("; fewer than 5 seeds state nothing.")
    page = finding_list(found)
    assert page.count('<li class="open">') == len(found) and "holds" not in page and "fails" not in page


def test_one_seed_has_no_p(make_run, write_grid, tmp_path: Path) -> None:
    results = load_results(made(make_run, write_grid, tmp_path, (0,)))
    assert "1 of 1 seeds: hack -0.89 (below 0 in 1 of 1, no p), solve " in claims(results, "toy")[0].text
    table = contrast_table(results, "toy", HACK)
    assert table is not None
    columns = [index for index, name in enumerate(table.header) if name.startswith("p")]
    assert columns and {row[index] for row in table.rows for index in columns} == {NONE}


def test_what_all_arms_share_is_on_the_page(results: Path) -> None:
    grid = json.loads((results / "grid.json").read_text())
    grid["overrides"] = ["+grad_routing/hardware=cpu", "data.val_max_samples=512", "~data.shuffle"]
    grid["environments"][0] |= {"options": {"hard": True, "width": 64}, "overrides": ["algorithm.gamma=1"]}
    (results / "grid.json").write_text(json.dumps(grid))
    assert shared_table(load_results(results)).rows == [
        ["every run", "steps", "10"],
        ["every run", "seeds", "0, 1, 2"],
        ["every run", "+grad_routing/hardware", "cpu"],
        ["every run", "data.val_max_samples", "512"],
        ["every run", "~data.shuffle", NONE],
        ["toy", "vgr prepare", "a folder that was given"],
        ["toy", "split", "test"],
        ["toy", "--set hard", "true"],
        ["toy", "--set width", "64"],
        ["toy", "algorithm.gamma", "1"],
    ]
    assert "data.val_max_samples" in report.write_report([results], results.parent / "page").read_text()


def test_environments_stand_side_by_side(results: Path) -> None:
    assert across_table(load_results(results)) is None  # one alone
    grid = json.loads((results / "grid.json").read_text())
    grid["environments"].append({**grid["environments"][0], "name": "big"})
    (results / "grid.json").write_text(json.dumps(grid))
    for path in results.glob("toy.persona.*.json"):
        data = json.loads(path.read_text()) | {"environment": "big"}
        (results / path.name.replace("toy", "big")).write_text(json.dumps(data))
    table = across_table(load_results(results))
    assert table is not None
    assert [row[:3] for row in table.rows if row[0] == "persona"] == [["persona", "toy", "3"], ["persona", "big", "3"]]
    ours = dict(zip(table.header, next(row for row in table.rows if row[1] == "big"), strict=True))
    alone = arms_table(load_results(results), "big")
    single = dict(zip(alone.header, next(row for row in alone.rows if row[0] == "persona"), strict=True))
    assert all(ours[measure.title] == single[measure.title] for measure in (HACK, HACK_UNKNOWN))
    assert ours["detector AUROC"].startswith("0.90") and "leakage" not in table.header


def test_every_arm_has_a_line_of_its_own_in_the_detectors_figure(results: Path, monkeypatch) -> None:
    runs = load_results(results).of("toy")
    styles = arm_styles(by_arm(runs))
    told_apart = {(style["color"], style["marker"]) for style in styles.values()}
    assert len(told_apart) == len(styles) == 4
    drawn = []
    monkeypatch.setattr(figures, "to_svg", lambda figure: drawn.append(figure) or "")
    signals_figure(runs)
    [legend] = drawn[0].legends
    marks = {(str(handle.get_color()), handle.get_marker()) for handle in legend.legend_handles}
    assert len(marks) == len(legend.legend_handles) == 3  # off has no detector to draw
    lines = [line for axis in drawn[0].axes for line in axis.lines if len(line.get_xdata()) > 2]
    assert lines and {(line.get_color(), line.get_marker()) for line in lines} == marks


def test_an_average_does_not_hide_the_worst_seed(make_run, write_grid, tmp_path: Path) -> None:
    folder = made(make_run, write_grid, tmp_path, tuple(range(5)))
    path = folder / "toy.persona.seed-3.json"
    data = json.loads(path.read_text())
    data["validations"][-1]["overall"]["hack"] = 256
    path.write_text(json.dumps(data))
    table = arms_table(load_results(folder), "toy")
    row = next(row for row in table.rows if row[0] == "persona")
    hack, worst = (table.header.index(name) for name in (HACK.title, "most hack of a seed, as deployed"))
    assert row[worst] == "1.00" and float(row[hack].split()[0]) < 0.1


def test_labels_are_marked_as_a_part_of_the_truth(results: Path) -> None:
    for path in results.glob("toy.persona.*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"signal": "labels"}))
    found = load_results(results)
    assert [row[0] for row in arms_table(found, "toy").rows[1:]] == ["off", "random", "persona ‡", "oracle †"]
    assert sum(note.startswith(("†", "‡")) for note in grid_notes(found)) == 2


def test_tables(results: Path) -> None:
    found = load_results(results)
    status = status_table(found)
    assert status.rows[1][2:] == ["2 of 3", "2", "–"] and "seed 2: ValueError" in status.rows[3][4]
    rates = arms_table(found, "toy")
    assert [row[0] for row in rates.rows] == ["before training", "off", "random", "persona", "oracle †"]
    # 4 * 6 of 256 hack, 100 solve before training, in every run
    assert rates.rows[0][3:8] == [*["0.09 [0.09, 0.09]", "0.39 [0.39, 0.39]"] * 2, "0.09 [0.09, 0.09]"]
    assert rates.rows[3][2] == "3" and rates.rows[3][5].startswith("0.07 [0.05, 0.08]")
    signals = signal_table(found, "toy")
    assert signals is not None and signals.header[1:4] == ["AUROC against the grader", "flagged", "routed"]
    row = next(row for row in signals.rows if row[0] == "persona")
    assert row[1:] == ["0.90 [0.90, 0.90]", "–", "0.50 [0.50, 0.50]", "–", "–"]
    differences = contrast_table(found, "toy", HACK)
    assert differences is not None
    assert [row[0] for row in differences.rows] == ["off", "random", "persona", "oracle †"]
    assert differences.rows[2][1:5] == ["3 with off, 2 with random", "-0.89 [-0.89, -0.89]", "0.250", "0.750"]
    assert differences.rows[0][2:6] == ["–"] * 4  # off minus off
    kinds = kinds_table(found, "toy")
    assert kinds is not None and kinds.header[1:3] == ["leak (known)", "blank (unknown)"]
    said = " ".join(grid_notes(found))
    assert "no p below 0.25, so none below 0.05" in said and "split test." in said and "choosing settings" not in said


def timed(results: Path) -> None:
    """Steps of 5 s for persona and of 3 s for the others, 1 s of each generation; seed 1 slower, and the first steps.

    Arm ``off`` becomes ``vanilla_2r``.
    """
    for path in results.glob("*.json"):
        path.write_text(path.read_text().replace('"off"', '"vanilla_2r"'))
    for path in results.glob("toy.*.json"):
        data = json.loads(path.read_text())
        if data["status"] == "finished":
            step = (4.0 if data["arm"] == "persona" else 2.0) * (1 + (data["seed"] == 1)) + 1
            steps = list(range(1, 8))
            times = {"timing_s/step": [step + 9 * (n < 4) for n in steps], "timing_s/gen": [1.0] * len(steps)}
            data["curves"] |= {key: {"steps": steps, "values": values} for key, values in times.items()}
            path.write_text(json.dumps(data))


def test_the_scorecard_tells_what_each_arm_reads_and_costs(results: Path) -> None:
    timed(results)
    found = load_results(results)
    table = scorecard_table(found)
    assert table.header[-1] == "cost against vanilla_2r, toy"
    rows = {row[0]: row[1:] for row in table.rows}
    seeds = ["3 seeds", "2 seeds", "3 seeds", "2 seeds"]  # of both: a seed that one of them lacks does not count
    ratios = ["1.00", "1.00", "2.00", "1.00"]
    assert [row[-1] for row in rows.values()] == [f"{r} ({n})" for r, n in zip(ratios, seeds, strict=True)]
    assert [row[2] for row in rows.values()] == ["no", "no", "no", "yes"]
    assert rows["random"][0].startswith("control: a random direction") and "contrastive pairs" in rows["persona"][1]
    assert "by that of vanilla_2r on the same seed" in " ".join(grid_notes(found))


def test_what_overrides_make_an_arm_read_is_said_of_its_runs(results: Path) -> None:
    """A weak monitor's preset with labels in its place assumes them; nothing is said of an arm that never ran."""
    grid = json.loads((results / "grid.json").read_text())
    for arm in grid["arms"]:
        arm["overrides"] = ["grad_routing.detector={name: labels, recall: 1.0}"] * (arm["name"] != "off")
        arm["preset"] = {"persona": "screen"}.get(arm["name"], arm["preset"])
    (results / "grid.json").write_text(json.dumps(grid))
    for path in results.glob("toy.*.json"):
        data = json.loads(path.read_text())
        if data["arm"] == "random":
            path.unlink()
        elif data["arm"] == "persona":
            path.write_text(json.dumps(data | {"detector": "labels", "signal": "labels", "control": True}))
    found = load_results(results)
    rows = {row[0]: row[1:] for row in scorecard_table(found).rows}
    assert rows["persona"][1:3] == ["set by overrides: labels (detector labels)", "yes"]
    assert rows["off"][1:3] == ["none", "no"] and rows["random"][1:3] == ["–", "–"]
    grid["arms"][2] |= {"preset": "persona", "overrides": ["grad_routing.detector.refresh_every=2"]}
    (results / "grid.json").write_text(json.dumps(grid))
    for path in results.glob("toy.persona.*.json"):
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | {"detector": "persona_act", "signal": "pairs", "control": False}))
    row = scorecard_table(load_results(results)).rows[2]
    assert row[0] == "persona" and "contrastive pairs" in row[2] and row[3] == "no"  # a setting, not another signal
    assert "by that of" not in " ".join(grid_notes(found))  # no vanilla_2r, no costs


def test_a_preset_of_ones_own_has_no_card(results: Path) -> None:
    path = results / "grid.json"
    path.write_text(path.read_text().replace('"preset": "random"', '"preset": "mine"'))
    rows = {row[0]: row[1:] for row in scorecard_table(load_results(results)).rows}
    assert rows["random"] == ["preset mine, which has no card", "none (detector random)", "no", *["–"] * 3]
    assert rows["persona"][-1] == "–"  # no vanilla_2r beside it


def test_numbers_of_the_selection_split_say_so(results: Path) -> None:
    path = results / "grid.json"
    path.write_text(path.read_text().replace('"split": "test"', '"split": "val"'))
    assert "choosing settings" in " ".join(grid_notes(load_results(results)))


def test_report_is_the_same_bytes_again(results: Path, tmp_path: Path) -> None:
    page = report.write_report([results], tmp_path / "a")
    report.write_report([results], tmp_path / "b")
    first, second = ({p.relative_to(to): p.read_bytes() for p in to.rglob("*") if p.is_file()}
                     for to in (tmp_path / "a", tmp_path / "b"))  # fmt: skip
    assert first == second
    names = {str(path) for path in first}
    assert {"report.html", "numbers.json", "tables/cells.md", "figures/toy-what-is-deployed.svg"} <= names
    assert {Path(name).suffix for name in names if name.startswith("tables")} == {".md", ".html", ".tex", ".csv"}
    text = page.read_text()
    assert text.count("<svg ") == 4 and str(tmp_path) not in text and "$" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for words in ("persona minus off", "10 of 12 runs", "out | of luck", "oracle †", "leak (known)"):
        assert words in text, words
    numbers = json.loads((page.parent / "numbers.json").read_text())
    assert numbers["unfinished"] == [["toy", "random", 2]] and numbers["failed"][0]["arm"] == "oracle"
    persona = [e for e in numbers["estimates"] if (e["arm"], e["measure"]) == ("persona", HACK.title)]
    assert persona[0]["by_seed"] == {"0": 13 / 256, "1": 17 / 256, "2": 21 / 256}


def test_rates_go_between_the_marks(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- results: small -->\nold\n<!-- end: small -->\nafter\n")
    embed(results, page)
    once = page.read_text()
    embed(results, page)
    assert page.read_text() == once and "old" not in once
    assert once.startswith("before\n<!-- results: small -->\n\n**toy: rates") and once.endswith("small -->\nafter\n")
    assert "| persona | pairs | 3 |" in once and "10 of 12 runs (seeds 0, 1, 2) have finished, 1 failed." in once
    for text in ("no marks", once.replace("<!-- end: small -->", ""), once + once):
        page.write_text(text)
        with pytest.raises(UserError, match=r"--into=.*<!-- results: small --> and <!-- end: small -->"):
            embed(results, page)
        assert page.read_text() == text


def test_mixed_versions_are_refused(results: Path, tmp_path: Path) -> None:
    path = results / "toy.persona.seed-1.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"versions": {"torch": "1.0"}}))
    with pytest.raises(
        UserError, match=r"toy\.off\.seed-0: torch='2\.0': '1\.0' in toy\.persona\.seed-1.*--allow-mixed"
    ):
        report.write_report([results], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert ["torch", "2.0, 1.0"] in versions_table(load_results(results, allow_mixed_versions=True)).rows
    path.write_text(json.dumps(data | {"code": "another"}))
    with pytest.raises(UserError, match="training code"):
        load_results(results)


def test_damaged_and_foreign_results(results: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shown alone"):
        report.write_report([results, tmp_path], tmp_path / "out")
    extra = json.loads((results / "toy.off.seed-0.json").read_text()) | {"arm": "gone"}
    (results / "toy.gone.seed-0.json").write_text(json.dumps(extra))
    assert load_results(results).extra == ["toy.gone.seed-0.json"]
    for damage, told in (("{", "unreadable"), ('{"format": 2}', "wanted 1"), ('{"format": 1}', "no result of a cell")):
        (results / "toy.off.seed-0.json").write_text(damage)
        with pytest.raises(UserError, match=told):
            load_results(results)


def test_no_finished_cell_is_told(results: Path, tmp_path: Path) -> None:
    for path in results.glob("toy.*.json"):
        if "oracle.seed-2" not in path.name:
            path.unlink()
    with pytest.raises(UserError, match="no finished cell: ValueError"):
        report.write_report([results], tmp_path / "out")


def test_formats_escape() -> None:
    table = Table("50% of a_b", ["x", "y & z"], [["a|b", "[1, 2]"], ['<"q">', "1,5"]])
    assert to_markdown(table).splitlines()[2:] == [
        "| x | y & z |", "| :-- | --: |", r"| a\|b | [1, 2] |", '| <"q"> | 1,5 |',
    ]  # fmt: skip
    assert r"\caption{50\% of a\_b}" in to_latex(table) and r"a|b & {[}1, 2] \\" in to_latex(table)
    assert list(csv.reader(to_csv(table).splitlines())) == [table.header, *table.rows]
    assert "&lt;&quot;q&quot;&gt;" in to_html(table) and "y &amp; z" in to_html(table)
