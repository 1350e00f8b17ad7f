"""Grids run with a stand-in for the trainer: nothing finished runs again, nothing that failed is hidden."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.compare.conftest import FAKE_TRAINER
from verl_grad_routing.compare import cells as grid_cells
from verl_grad_routing.compare import execute, job_numbers, resume
from verl_grad_routing.compare import launch as launcher
from verl_grad_routing.compare import record as records
from verl_grad_routing.compare.execute import affordable, run_grid
from verl_grad_routing.compare.formats import to_markdown
from verl_grad_routing.compare.grid import load_grid
from verl_grad_routing.compare.grid_report import comparison_tables
from verl_grad_routing.compare.results import load_results
from verl_grad_routing.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
# Whatever a run measures of itself; everything else of a result is the same however often it was interrupted.
MEASURED = ("wall_s", "peak_rss_bytes", "peak_private_bytes", "resumed_from", "curves", "revision")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "POLL_S", 0.05)
    monkeypatch.setattr(launcher, "PATIENCE_S", 0.5)


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that returns the runs that have started, each ``arm/seed-n first-step``."""
    path = tmp_path / "starts.txt"
    monkeypatch.setenv("FAKE_STARTS", str(path))
    monkeypatch.setenv("FAKE_PLAN", "{}")
    return lambda: path.read_text().splitlines() if path.exists() else []


def told(folder: Path) -> dict[str, dict]:
    """Results by file name, without what differs between two runs of one thing."""
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: {k: v for k, v in data.items() if k not in MEASURED} for name, data in read.items()}


def tables(folder: Path) -> list[str]:
    """Every table of the report as text, but for times and memory."""
    found = comparison_tables(load_results(folder))
    kept = [table for table in found if "time and memory" not in table.title and table.title != "Versions"]
    assert len(kept) >= 8
    return [to_markdown(table) for table in kept]


def test_killed_half_way_it_finishes_without_running_anything_again(
    write_grid, tmp_path: Path, starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = write_grid(save_every=2)
    whole = run_grid(grid, tmp_path / "whole", trainer=FAKE_TRAINER)
    assert not whole.failed and len(starts()) == 4
    (tmp_path / "starts.txt").unlink()

    monkeypatch.setenv("FAKE_PLAN", json.dumps({"persona/seed-0": "hang"}))  # after the checkpoint of step 2
    script = "from verl_grad_routing.compare import launch, execute; launch.POLL_S, launch.PATIENCE_S = 0.05, 0.5; "
    script += f"execute.run_grid({str(grid)!r}, {str(tmp_path / 'cut')!r}, trainer={FAKE_TRAINER!r})"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    metrics = tmp_path / "cut" / "toy" / "persona" / "seed-0" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.read_text().count("\n") == 3)
    with pytest.raises(UserError, match=f"another vgr compare .process {process.pid}. works there"):
        run_grid(grid, tmp_path / "cut", trainer=FAKE_TRAINER)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if str(metrics.parent) in str(p.info["cmdline"])])
    record = tmp_path / "cut" / "toy" / "off" / "seed-0" / "run.json"
    before = (record.read_bytes(), record.stat().st_mtime_ns)
    assert starts() == ["off/seed-0 0", "persona/seed-0 0"]

    monkeypatch.setenv("FAKE_PLAN", "{}")
    again = run_grid(grid, tmp_path / "cut", trainer=FAKE_TRAINER)
    assert not again.failed
    assert starts()[2:] == ["persona/seed-0 2", "off/seed-1 0", "persona/seed-1 0"]  # goes on from step 2
    assert before == (record.read_bytes(), record.stat().st_mtime_ns)
    assert told(again.results) == told(whole.results)
    assert tables(again.results) == tables(whole.results)
    resumed = next(run for run in load_results(again.results).runs if run.name == "toy.persona.seed-0")
    assert resumed.record.resumed_from == 2
    assert resumed.curve("hack/rate").values.tolist() == [0.25, 0.5, 0.75, 1.0]  # both parts, one sequence

    third = run_grid(grid, tmp_path / "cut", trainer=("false",))
    assert not third.failed and told(third.results) == told(whole.results) and len(starts()) == 5


def test_without_checkpoints_a_killed_cell_starts_over(write_grid, tmp_path: Path, starts, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_PLAN", json.dumps({"persona": "hang"}))
    grid, out = write_grid(seeds=[0], arms=["persona"], reference="persona", limit_s=8.0), tmp_path / "out"
    first = run_grid(grid, out, trainer=FAKE_TRAINER)
    assert first.failed == ("toy/persona/seed-0",)
    [failure] = load_results(first.results).failures
    assert "limit_s=8.0: toy/persona/seed-0 had done 3 of 4 steps" in failure.error
    assert str(tmp_path) not in failure.error and "TO/toy/persona/seed-0/log.txt" in failure.error
    monkeypatch.setenv("FAKE_PLAN", "{}")
    assert not run_grid(write_grid(seeds=[0], arms=["persona"], reference="persona"), out, trainer=FAKE_TRAINER).failed
    assert starts() == ["persona/seed-0 0"] * 2 and not load_results(first.results).failures


def test_a_failed_cell_is_reported_and_the_others_go_on(
    write_grid, tmp_path: Path, starts, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("FAKE_PLAN", json.dumps({"off/seed-1": "fail"}))
    outcome = run_grid(write_grid(jobs=2), tmp_path / "out", trainer=FAKE_TRAINER)
    assert outcome.failed == ("toy/off/seed-1",) and len(starts()) == 4
    found = load_results(outcome.results)
    assert (
        len(found.runs) == 3
        and "ValueError: out of luck in TO/toy/off/seed-1, fake_trainer.py" in found.failures[0].error
    )
    execute.show(outcome)
    out, err = capsys.readouterr()
    assert "toy/off/seed-1: FAILED, the others go on" in err and "1 of 2" in out
    assert "failed: toy/off/seed-1: toy/off/seed-1='exit status 1': ValueError: out of luck" in out


def test_a_finished_cell_of_another_configuration_is_refused_untouched(write_grid, tmp_path: Path, starts) -> None:
    out, few = tmp_path / "out", {"seeds": [0], "arms": ["off"]}
    run_grid(write_grid(**few), out, trainer=FAKE_TRAINER)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"toy/off/seed-0='settings [0-9a-f]{16}': a finished run of other settings"):
        run_grid(write_grid(**few, steps=5), out, trainer=FAKE_TRAINER)
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} | {
        out / ".lock": files[out / ".lock"]
    }
    more = run_grid(write_grid(seeds=[0, 1], arms=["off"]), out, trainer=FAKE_TRAINER)  # a grid may grow
    assert starts() == ["off/seed-0 0", "off/seed-1 0"] and len(load_results(more.results).runs) == 2


def test_checkpoints_of_another_configuration_are_not_deleted(write_grid, tmp_path: Path, starts, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_PLAN", json.dumps({"off": "fail"}))
    out, few = tmp_path / "out", {"seeds": [0], "arms": ["off"], "save_every": 2}
    assert run_grid(write_grid(**few), out, trainer=FAKE_TRAINER).failed
    checkpoint = out / "toy" / "off" / "seed-0" / "checkpoints" / "global_step_2"
    with pytest.raises(
        UserError, match=r"toy/off/seed-0='settings [0-9a-f]{16}': an unfinished run of other .* checkpoint of step 2"
    ):
        run_grid(write_grid(**few, steps=5), out, trainer=FAKE_TRAINER)
    assert checkpoint.is_dir() and len(starts()) == 1
    attempt = checkpoint.parents[1] / "attempt.json"
    before = attempt.read_text()
    attempt.write_text("")
    with pytest.raises(UserError, match=r"'settings None': an unfinished run of unknown .attempt\.json cannot be read"):
        run_grid(write_grid(**few), out, trainer=FAKE_TRAINER)
    attempt.write_text(before)
    monkeypatch.setenv("FAKE_PLAN", "{}")
    assert not run_grid(write_grid(**few), out, trainer=FAKE_TRAINER).failed
    assert starts() == ["off/seed-0 0", "off/seed-0 2"]


def test_killed_after_its_last_checkpoint_a_cell_goes_on_from_the_one_before(tmp_path: Path) -> None:
    resume.note_attempt(tmp_path, "aa")
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"global_step_{step}" / "actor").mkdir(parents=True)
    (tmp_path / "checkpoints" / "global_step_6" / "actor").mkdir(parents=True)  # cut short: not called complete
    latest = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    latest.write_text("4")
    assert resume.checkpoints(tmp_path) == [2, 4] and resume.resumable(tmp_path, "aa", 4) == 2
    resume.set_aside(tmp_path, 2)
    assert latest.read_text().strip() == "2" and resume.checkpoints(tmp_path) == [2]
    assert resume.resumable(tmp_path, "aa", 4) == 2


def test_code_that_changes_during_a_run_is_told(write_grid, tmp_path: Path, starts, monkeypatch, capsys) -> None:
    steady = run_grid(write_grid(seeds=[0], arms=["off"]), tmp_path / "steady", trainer=FAKE_TRAINER)
    assert load_results(steady.results).runs[0].record.code == records.code_hash()
    assert "changed while" not in capsys.readouterr().err

    monkeypatch.setattr(records, "made_with", lambda: {"versions": {}, "code": "c0de", "revision": "r0"})
    outcome = run_grid(write_grid(seeds=[0], arms=["off"]), tmp_path / "out", trainer=FAKE_TRAINER)
    assert "toy/off/seed-0: the training code changed while it ran" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"toy\.off\.seed-0: training code='c0de, changed meanwhile'.*runs it again"):
        load_results(outcome.results)
    [run] = load_results(outcome.results, allow_mixed_versions=True).runs
    assert run.record.revision == "r0"
    monkeypatch.setattr(records, "code_hash", lambda: exec("raise OSError"))
    assert launcher._code_changed("c0de")


def test_what_ends_one_cell_badly_leaves_the_others(write_grid, tmp_path: Path, starts, monkeypatch) -> None:
    """A supervisor that does not end, or that somebody else ended."""
    stop, hung = launcher._stop, []

    def stubborn(process) -> bool:
        ended = stop(process)
        return ended and bool(hung or hung.append(1))

    monkeypatch.setattr(launcher, "_stop", stubborn)
    outcome = run_grid(write_grid(seeds=[0]), tmp_path / "out", trainer=FAKE_TRAINER)
    assert outcome.failed == ("toy/off/seed-0",) and len(starts()) == 2
    [failure] = load_results(outcome.results).failures
    assert "not ended 60 s after it was told to" in failure.error
    with pytest.raises(UserError, match=r"processes\.json.*supervisor was ended from outside"):
        launcher._processes(tmp_path)


def test_a_supervisor_that_does_not_end_is_killed(monkeypatch) -> None:
    monkeypatch.setattr(launcher, "STOP_S", 0.2)
    deaf = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=subprocess.PIPE)
    assert not launcher._stop(deaf) and deaf.returncode == -signal.SIGKILL
    willing = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    monkeypatch.setattr(launcher, "STOP_S", 30)
    assert launcher._stop(willing)


def test_an_environment_of_the_grids_own_is_built_once(write_grid, tmp_path: Path, starts) -> None:
    small = {"train_size": 4, "val_size": 4, "test_size": 4, "pairs": 2, "steps": 1, "width": 64, "layers": 2}
    place = {"name": "tiny", "prepare": "caps", "options": small}
    grid, out = write_grid(seeds=[0], arms=["off"], environments=[place]), tmp_path / "out"
    assert not run_grid(grid, out, trainer=FAKE_TRAINER).failed
    manifest = out / "environments" / "tiny" / "manifest.json"
    before = (manifest.read_bytes(), manifest.stat().st_mtime_ns)
    assert not run_grid(grid, out, trainer=FAKE_TRAINER).failed
    assert starts() == ["off/seed-0 0"] and before == (manifest.read_bytes(), manifest.stat().st_mtime_ns)
    with pytest.raises(UserError, match=r"environments\.tiny\.split='val2'"):
        run_grid(write_grid(seeds=[0], arms=["off"], environments=[{**place, "split": "val2"}]), out)


def test_a_reward_function_that_was_changed_is_refused(write_grid, tmp_path: Path, starts) -> None:
    reward, built = tmp_path / "mine.py", tmp_path / "mine"
    reward.write_text("def score(**kwargs):\n    return 1.0\n")
    digest = hashlib.sha256(reward.read_bytes()).hexdigest()
    settings = {"reward": f"{reward}:score", "sha256": {"reward": digest}}
    facts = {"settings": settings, "versions": {}, "sizes": {}, "sha256": {}, "statistics": {}}
    built.mkdir()
    (built / "manifest.json").write_text(json.dumps({"environment": "parquet", "layout": 1, **facts}))
    (built / "test.parquet").touch()
    grid = write_grid(seeds=[0], arms=["off"], environments=[{"name": "mine", "dir": "mine"}])
    assert not run_grid(grid, tmp_path / "out", trainer=FAKE_TRAINER).failed
    reward.write_text("def score(**kwargs):\n    return 2.0\n")
    with pytest.raises(
        UserError, match=r"environments\.mine\.dir='mine': changed since it was built: .*mine\.py:score"
    ):
        run_grid(grid, tmp_path / "more", trainer=FAKE_TRAINER)
    assert len(starts()) == 1


def test_ctrl_c_leaves_finished_cells_and_no_processes(write_grid, tmp_path: Path, starts, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_PLAN", json.dumps({"persona": "hang"}))
    grid = write_grid(seeds=[0])
    script = "from verl_grad_routing.compare import launch, execute; launch.POLL_S, launch.PATIENCE_S = 0.05, 0.5; "
    script += f"execute.run_grid({str(grid)!r}, {str(tmp_path / 'out')!r}, trainer={FAKE_TRAINER!r})"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, env=os.environ)
    metrics = tmp_path / "out" / "toy" / "persona" / "seed-0" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.read_text().count("\n") == 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and b"KeyboardInterrupt" in err
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(metrics.parent) in str(p.info["cmdline"])]
    found = load_results(tmp_path / "out" / "results")
    assert [run.name for run in found.runs] == ["toy.off.seed-0"] and found.unfinished() == [("toy", "persona", 0)]


def test_a_checkpoint_counts_only_for_the_same_settings_and_with_steps_left(tmp_path: Path) -> None:
    resume.note_attempt(tmp_path, "aa")
    assert resume.resumable(tmp_path, "aa", 4) == 0  # no checkpoint
    actor = tmp_path / "checkpoints" / "global_step_2" / "actor"
    actor.mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    found = [resume.resumable(tmp_path, *given) for given in (("aa", 4), ("bb", 4), ("aa", 2), ("aa", 0))]
    assert found == [2, 0, 0, 0]
    actor.rmdir()  # named, but verl has made room: of the older ones it leaves the data loader's state
    assert resume.resumable(tmp_path, "aa", 4) == 0


def test_metrics_of_interrupted_runs_become_one_sequence(tmp_path: Path) -> None:
    def write(attempt: int, *steps: int, cut: str = "") -> None:
        lines = [json.dumps({"step": step, "data": {"attempt": attempt}}) + "\n" for step in steps]
        (tmp_path / "metrics.jsonl").write_text("".join(lines) + cut)

    for attempt, steps, checkpoint in ((0, (1, 2, 3), 2), (1, (3, 4, 5), 4), (2, (5,), 4)):
        write(attempt, *steps, cut='{"step": 6, "da')  # killed while it wrote
        resume.set_aside(tmp_path, checkpoint)
        assert not (tmp_path / "metrics.jsonl").exists()
    write(3, 5, 6)
    resume.put_back(tmp_path, 4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["data"]["attempt"]) for row in rows] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 3), (6, 3)]
    assert not (tmp_path / "metrics.earlier.jsonl").exists()


def test_no_more_at_once_than_the_machine_allows(write_grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 20 * 2**30})())
    for keys, jobs in (
        ({"jobs": 3, "cores_per_cell": 2, "memory_gib_per_cell": 1}, 3),
        ({"jobs": 9, "cores_per_cell": 2, "memory_gib_per_cell": 1}, 4),
        ({"jobs": 9, "cores_per_cell": 2, "memory_gib_per_cell": 9}, 2),
        ({"jobs": 9, "cores_per_cell": 16, "memory_gib_per_cell": 90}, 1),
        ({"ray_address": "auto"}, 1),
    ):
        chosen, why = affordable(load_grid(write_grid(**keys)))
        assert chosen == jobs and f"{jobs} at a time" in why


def test_a_result_without_its_run_folder_is_finished(write_grid, tmp_path: Path, starts) -> None:
    out, grid = tmp_path / "out", write_grid(seeds=[0], arms=["off", "persona"])
    run_grid(grid, out, trainer=FAKE_TRAINER)
    shutil.rmtree(out / "toy" / "off")
    result = out / "results" / "toy.off.seed-0.json"
    before = result.read_bytes()
    assert not run_grid(grid, out, trainer=FAKE_TRAINER).failed
    assert starts() == ["off/seed-0 0", "persona/seed-0 0"] and result.read_bytes() == before
    result.write_text(before.decode().replace('"settings_hash": "', '"settings_hash": "0'))
    with pytest.raises(
        UserError, match=r"toy/off/seed-0='settings 0[0-9a-f]{16}': a finished result of other settings"
    ):
        run_grid(grid, out, trainer=FAKE_TRAINER)
    result.write_text("{")
    with pytest.raises(UserError, match=r"toy\.off\.seed-0\.json='unreadable': no result of a cell"):
        run_grid(grid, out, trainer=FAKE_TRAINER)
    assert len(starts()) == 2


def test_a_result_stands_when_its_run_folder_is_damaged(write_grid, tmp_path: Path, starts, capsys) -> None:
    out, grid = tmp_path / "out", write_grid(seeds=[0], arms=["off"])
    run_grid(grid, out, trainer=FAKE_TRAINER)
    result = out / "results" / "toy.off.seed-0.json"
    before = result.read_bytes()
    shutil.rmtree(out / "toy" / "off" / "seed-0" / "val")  # to free the disk
    assert not run_grid(grid, out, trainer=FAKE_TRAINER).failed
    assert result.read_bytes() == before and len(starts()) == 1
    assert "toy/off/seed-0: its result stands, its folder is damaged" in capsys.readouterr().err


def test_a_given_environment_that_was_changed_is_refused(write_grid, environment: Path, tmp_path: Path, starts) -> None:
    manifest = json.loads((environment / "manifest.json").read_text())
    manifest["sha256"] = {"test.parquet": "0"}
    (environment / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"environments\.toy\.dir.*changed since it was built: test\.parquet"):
        run_grid(write_grid(), tmp_path / "out", trainer=FAKE_TRAINER)
    assert not starts()


def test_a_single_cell_has_a_ray_of_its_own_where_the_first_number_is_taken(
    write_grid, tmp_path: Path, monkeypatch
) -> None:
    """Two comparisons on one machine, or one beside the demo: each would be job 1, and share verl's socket."""
    starters: list[list[str]] = []

    def fake_launch(*_, starter, name, **__):
        starters.append(starter)
        raise UserError(name, starter, "not run")

    monkeypatch.setattr(execute, "launch", fake_launch)
    monkeypatch.setattr(job_numbers, "FOLDER", tmp_path)
    monkeypatch.setattr(grid_cells, "check_configurations", lambda _: {("toy", "off"): {"num_cpus": 2, "num_gpus": 1}})
    grid = write_grid(seeds=[0], arms=["off"])
    run_grid(grid, tmp_path / "alone")
    with job_numbers.reserved():
        run_grid(grid, tmp_path / "beside")
    assert starters[0] == [] and starters[1][2:] == ["verl_grad_routing.compare.own_ray", "2", starters[1][4]]


def test_runs_at_once_do_not_share_a_ray(write_grid, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="jobs=2: set 1 with a ray_address: verl's TransferQueue is one per Ray"):
        run_grid(write_grid(jobs=2, ray_address="auto"), tmp_path / "out", trainer=FAKE_TRAINER)
    assert not (tmp_path / "out" / "results").exists()


def test_cells_at_once_have_jobs_of_different_numbers(write_grid, tmp_path: Path, monkeypatch) -> None:
    """verl names its socket for weights after the number of the Ray job."""
    at_once: list[tuple[str, ...]] = []
    now: set[str] = set()

    def fake_launch(*_, starter, name, **__):
        now.add(starter[3])
        at_once.append(tuple(sorted(now)))
        time.sleep(0.05)
        now.discard(starter[3])
        raise UserError(name, starter, "not run")

    monkeypatch.setattr(execute, "launch", fake_launch)
    monkeypatch.setattr(execute, "affordable", lambda grid: (grid.jobs, ""))
    monkeypatch.setattr(job_numbers, "FOLDER", tmp_path)
    sizes = {("toy", arm): {"num_cpus": 32, "num_gpus": None} for arm in ("off", "persona")}
    monkeypatch.setattr(grid_cells, "check_configurations", lambda _: sizes)
    outcome = run_grid(write_grid(jobs=2, seeds=[0, 1, 2, 3]), tmp_path / "out")
    assert len(outcome.failed) == 8 and ("2", "3") in at_once and set(at_once) <= {("2",), ("3",), ("2", "3")}
    assert '{"num_cpus": 32, "num_gpus": null}' in load_results(outcome.results).failures[0].error


def until(condition, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)
