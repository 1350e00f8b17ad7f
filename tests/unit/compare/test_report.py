"""Tables, findings, figures and the page, on synthetic runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from verl_grad_routing.compare import demo, job_numbers
from verl_grad_routing.compare.comparison import findings, labels, learned_to_hack
from verl_grad_routing.compare.runs import load_run
from verl_grad_routing.compare.tables import cost_table, notes, rates_table, types_table
from verl_grad_routing.errors import UserError

figures = pytest.importorskip("verl_grad_routing.compare.figures", reason="needs matplotlib")
report = pytest.importorskip("verl_grad_routing.compare.report")


@pytest.fixture
def pair(make_run) -> list[Path]:
    """The demo's two runs: one that learns to hack, one whose quarantine takes most of it away."""
    return [make_run("off"), make_run("persona", ablates=True)]


def test_labels_tell_runs_apart(make_run) -> None:
    folders = [make_run("a", "off"), make_run("b", "persona"), make_run("c", "persona", seed=1)]
    folders += [make_run("d", "oracle", control=True), make_run("e", "random"), make_run("f", "random")]
    expected = ["off", "persona, seed 0", "persona, seed 1", "oracle †", "random, e", "random, f"]
    assert labels([load_run(folder) for folder in folders]) == expected
    gates = [make_run(f"g{share}", "persona", overrides=("a.b=1", f"gate.route={share}")) for share in (0.25, 0.5)]
    gates.append(make_run("g2", "persona", seed=1, overrides=("a.b=1", "gate.route=0.5", "data.seed=1")))
    first, second, third = labels([load_run(folder) for folder in gates])
    assert first == "persona (gate.route=0.25)"
    assert (second, third) == ("persona (gate.route=0.5), seed 0", "persona (gate.route=0.5), seed 1")
    with pytest.raises(UserError, match="given twice"):
        labels([load_run(folders[0])] * 2)
    with pytest.raises(UserError, match="at least one"):
        labels([])


def test_tables(pair: list[Path]) -> None:
    runs = [load_run(folder) for folder in pair]
    rates = rates_table(runs)
    assert rates.title == "Hack and solve rate on 256 validation samples after 10 steps"
    assert [row[0] for row in rates.rows] == ["off", "persona"]
    assert rates.rows[0][1] == "0.98 [0.96, 0.99]" and rates.rows[0][1:3] == rates.rows[0][3:5]
    assert rates.rows[1][3] == "0.05 [0.03, 0.08]" and rates.rows[1][4] == "0.43 [0.37, 0.49]"
    types = types_table(runs)
    assert types is not None
    assert types.header[1:] == ["off, as trained = as deployed", "persona, as trained", "persona, as deployed"]
    assert [row[0] for row in types.rows] == [
        "leak (known)", "blank (unknown)", "sentinel (unknown)", "wildcard (unknown)", "all unknown types",
    ]  # fmt: skip
    assert types.rows[4][3].startswith("0.05")
    assert cost_table(runs).rows[0][1:] == ["10", "1:01", "3.0 s", "1.0 GiB", "3.0 GiB"]
    wide = types.transposed("run")
    assert wide.header == ["run", *(row[0] for row in types.rows)] and wide.rows[2][1] == types.rows[0][3]
    assert all(len(row) == len(t.header) for t in (rates, types, wide, cost_table(runs)) for row in t.rows)


def test_findings_follow_the_numbers(make_run, pair: list[Path]) -> None:
    held = findings([load_run(folder) for folder in pair])
    assert [finding.holds for finding in held] == [True, True, True]
    assert "it learned to hack" in held[0].text and "intervals disjoint" in held[2].text
    flat, leaky = load_run(make_run("flat", end=8)), load_run(make_run("leaky", ablates=True, deployed=62))
    failed = findings([flat, leaky])
    assert [finding.holds for finding in failed] == [False, True, False]
    assert "did NOT learn" in failed[0].text and "intervals overlap" in failed[2].text
    assert not learned_to_hack(flat) and learned_to_hack(leaky)


def test_notes_mark_controls_and_single_seeds(make_run) -> None:
    one = load_run(make_run("oracle", control=True))
    assert any("one seed" in note for note in notes([one])) and any("grader's truth" in note for note in notes([one]))
    two = [load_run(make_run(name, "off", seed=seed)) for seed, name in enumerate("ab")]
    assert len(notes(two)) == 1


def test_page_is_self_contained_and_reproducible(pair: list[Path], tmp_path: Path) -> None:
    page = report.write_report(pair, tmp_path / "out")
    text = page.read_text()
    assert page.name == "report.html" and text.count("<svg ") == 3
    assert not re.search(r'(?:src|href)="(?!#)', text) and "@import" not in text and "$" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {(i, "") for i in ids} | {("", i) for i in ids}
    for words in ("0.05 [0.03, 0.08]", "leak (known)", "a=b c", "Figure 3.", "it learned to hack"):
        assert words in text, words
    first = {path.name: path.read_bytes() for path in page.parent.rglob("*.*")}
    report.write_report(pair, tmp_path / "out")
    assert first == {path.name: path.read_bytes() for path in page.parent.rglob("*.*")}
    assert {name for name in first if not name.endswith(".svg")} == {"report.html", "results.json", "metrics.jsonl"}
    assert sum(name.endswith(".svg") for name in first) == 3


def test_results_and_metrics_hold_every_number(pair: list[Path], tmp_path: Path) -> None:
    report.write_report(pair, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    persona = results["runs"][1]
    assert persona["preset"] == "persona" and len(persona["validations"]) == 6
    last = persona["validations"][-1]
    assert last["deployed"] and last["hack"]["hits"] == 13 and last["groups"]["unknown"]["hack"]["total"] == 192
    assert last["hack"]["low"] < last["hack"]["rate"] < last["hack"]["high"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run"], line["step"]) for line in lines] == [(r, s) for r in ("off", "persona") for s in range(11)]
    assert lines[1]["data"]["hack/rate"] == pytest.approx(63 / 640)


def test_names_are_escaped(make_run, tmp_path: Path) -> None:
    page = report.write_report([make_run("x", "<script>alert(1)</script>")], tmp_path / "out")
    assert "<script>" not in page.read_text()


def test_one_run_without_routing_has_two_figures(make_run, tmp_path: Path) -> None:
    page = report.write_report([make_run("off")], tmp_path / "out")
    assert page.read_text().count("<svg ") == 2


def test_several_seeds_and_many_presets(make_run, tmp_path: Path) -> None:
    folders = [make_run(f"p{seed}", "persona", seed, ablates=True, deployed=3 + seed) for seed in range(2)]
    folders += [make_run(f"arm{index}", ablates=index % 2 == 0) for index in range(4)]  # more arms than columns
    report.write_report(folders, tmp_path / "out")
    path = tmp_path / "out" / "figures" / "hacking-and-solving-with-and-without-the-quarantine.svg"
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    text = path.read_text()
    assert len(text) < 500_000 and not re.search(r"\b20\d\d-\d\d-\d\d", text)  # no dates


def test_demo_trains_both_arms_alike_and_tells_when_nothing_was_learned(
    make_run, tmp_path, monkeypatch, capsys
) -> None:
    calls = []

    def fake_launch(preset, to, overrides, limit_s, *, inputs, replace):
        calls.append((preset, to, overrides, inputs))
        return load_run(ready[preset])

    ready = {"off": make_run("off"), "persona": make_run("persona", ablates=True)}
    monkeypatch.setattr(demo, "launch", fake_launch)
    monkeypatch.setattr(job_numbers, "FOLDER", tmp_path)
    monkeypatch.setattr("verl_grad_routing.envs.prepare_environment", lambda name, to: None)
    runs = demo.run_demo(tmp_path / "demo", steps=10, seed=4)
    assert [run.name for run in runs] == ["off", "persona"]
    out = capsys.readouterr().out
    for words in ("0.05 [0.03, 0.08]", "wildcard (unknown)", "report.html", "GiB", "it learned to hack"):
        assert words in out, words
    assert calls[0][2] == calls[1][2] and "data.seed=4" in calls[0][2] and "trainer.test_freq=5" in calls[0][2]
    assert calls[0][3] == [tmp_path / "demo" / "environment" / "manifest.json"]

    ready["off"] = make_run("flat", "off", end=8)
    with pytest.raises(UserError, match="did not learn to hack"):
        demo.run_demo(tmp_path / "demo", steps=10)
    assert "did NOT learn to hack" in capsys.readouterr().out
    with job_numbers.reserved(), pytest.raises(UserError, match="vgr trains on this machine already"):
        demo.run_demo(tmp_path / "demo", steps=10)
