"""Run folders read back, and rates counted from the dumped samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from verl_grad_routing.compare.record import Record, settings_hash
from verl_grad_routing.compare.runs import load_run
from verl_grad_routing.compare.statistics import Rate, disjoint, mean_interval, wilson
from verl_grad_routing.errors import UserError


def test_wilson_is_the_closed_form() -> None:
    z = 1.959963984540054  # the normal quantile at 0.975
    for hits, total in ((0, 10), (3, 10), (128, 256), (256, 256)):
        p = hits / total
        centre = (p + z * z / (2 * total)) / (1 + z * z / total)
        half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
        assert wilson(hits, total) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-12)


def test_disjoint() -> None:
    low, high, middle = Rate(10, 256), Rate(200, 256), Rate(16, 256)
    assert disjoint(low, high) and disjoint(high, low)
    assert not disjoint(low, middle) and not disjoint(low, low)


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (3, 2), (-1, 4)])
def test_impossible_counts_are_refused(hits: int, total: int) -> None:
    with pytest.raises(UserError, match="rate="):
        Rate(hits, total)


def test_mean_interval_is_student_t() -> None:
    mean, low, high = mean_interval([0.4, 0.5, 0.6])
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t quantile at 0.975, two degrees of freedom
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="two"):
        mean_interval([0.5])


def test_curves_leave_out_what_was_not_logged(make_run) -> None:
    run = load_run(make_run("persona", ablates=True))
    hack, auroc = run.curve("hack/rate"), run.curve("detector/auroc")
    assert hack.steps.tolist() == list(range(1, 11)) and hack.values.dtype == np.float64
    assert auroc.steps.tolist() == list(range(2, 11))  # null at step 1
    assert run.last_step == 10 and not run.has("nothing")
    with pytest.raises(UserError, match="nearest: hack/rate"):
        run.curve("hack/rates")


def test_rates_count_samples(make_run) -> None:
    run = load_run(make_run("persona", ablates=True, end=60, deployed=3))
    trained, deployed = run.rates("last", deployed=False), run.rates("last", deployed=True)
    assert run.validation_steps == [0, 5, 10]
    assert (trained.overall.hack.hits, trained.overall.hack.total) == (240, 256)
    assert trained.overall.solve.hits == 16  # all that do not hack
    assert (deployed.overall.hack.hits, deployed.overall.solve.hits) == (13, 110)
    assert deployed.known is not None and deployed.unknown is not None
    assert (deployed.known.hack.hits, deployed.known.hack.total) == (3, 64)
    assert (deployed.unknown.hack.hits, deployed.unknown.hack.total) == (10, 192)
    assert list(deployed.types) == ["leak", "blank", "sentinel", "wildcard"]  # known ones first
    assert deployed.types["wildcard"].hack.hits == 4 and deployed.known_types == {"leak"}
    assert run.rates("first", deployed=False).step == 0 and run.rates(5, deployed=True).step == 5
    with pytest.raises(UserError, match="after steps 0, 5, 10"):
        run.rates(7, deployed=False)


def test_deployed_is_trained_only_where_nothing_is_ablated(make_run) -> None:
    off = load_run(make_run("off"))
    assert off.rates(deployed=True).overall == off.rates(deployed=False).overall
    folder = make_run("persona", ablates=True)
    (folder / "val" / "deployed" / "10.jsonl").unlink()
    with pytest.raises(UserError, match=r"deployed/10\.jsonl"):
        load_run(folder).rates(deployed=True)


def test_ablation_is_read_off_the_folder_without_a_record(make_run) -> None:
    assert load_run(make_run("a", ablates=True, record=False)).ablates
    plain = load_run(make_run("b", record=False))
    assert not plain.ablates and plain.record.preset == "b"


def test_parts_of_a_step_are_merged(tmp_path: Path) -> None:
    lines = [{"step": 2, "data": {"a": 1}}, {"step": 1, "data": {"a": 3.0}}, {"step": 2, "data": {"b": 2, "c": None}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_run(tmp_path).rows == {1: {"a": 3.0}, 2: {"a": 1.0, "b": 2.0}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "no steps logged"),
        ('{"step": 1, "data": {"a": 1}}\n{"step": 2, "da', "cut short"),
        ('{"a": 1}\n', "file logger"),
    ],
)
def test_damaged_metrics_are_told_in_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"hack": None}, {"solve": 0.5}])
def test_samples_need_their_facts(make_run, change: dict) -> None:
    folder = make_run("off")
    path = folder / "val" / "10.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"10\.jsonl:4: {next(iter(change))}="):
        load_run(folder).rates(deployed=False)


def test_samples_without_types_still_count(make_run) -> None:
    folder = make_run("off")
    path = folder / "val" / "10.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"hack": s["hack"], "solve": s["solve"]}) + "\n" for s in samples))
    rates = load_run(folder).rates(deployed=False)
    assert rates.overall.hack.total == 256 and rates.types == {} and rates.known is None and rates.unknown is None


def test_no_validation_is_told(make_run) -> None:
    folder = make_run("off")
    for path in (folder / "val").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"trainer\.test_freq"):
        load_run(folder).rates(deployed=False)


def test_record_round_trip(tmp_path: Path) -> None:
    record = Record(preset="off", seed=1, overrides=("a=1",), command=("python",), versions={"torch": "2"})
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match="no record"):
        Record.read(tmp_path)


def test_settings_hash_follows_settings_and_input_content(tmp_path: Path) -> None:
    data = tmp_path / "manifest.json"
    data.write_text("1")
    first = settings_hash("off", ["a=1"], [data])
    assert first == settings_hash("off", ["a=1"], [data])
    assert first != settings_hash("persona", ["a=1"], [data])
    assert first != settings_hash("off", ["a=2"], [data])
    data.write_text("2")
    assert first != settings_hash("off", ["a=1"], [data])
    with pytest.raises(UserError, match="no such file"):
        settings_hash("off", [], [tmp_path / "absent"])


def test_a_folder_that_is_no_finished_run_names_the_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.logger=.*test_freq.*validation_data_dir=.*VERL_FILE_LOGGER_PATH="):
        load_run(tmp_path)
