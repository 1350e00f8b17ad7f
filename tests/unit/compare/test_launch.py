"""The launcher against a program that behaves like a trainer: daemons, orphans, shared memory, failures."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import psutil
import pytest

from verl_grad_routing.compare import launch as launcher
from verl_grad_routing.compare.launch import last_error, launch, quoted, seed_overrides
from verl_grad_routing.compare.record import Record
from verl_grad_routing.errors import UserError

TRAINER = """
    import json, mmap, os, subprocess, sys, time
    from pathlib import Path

    arguments = dict(a.lstrip("+").split("=", 1) for a in sys.argv[1:])
    steps, mode, mark = int(arguments["trainer.total_training_steps"]), arguments["mode"], arguments["mark"]
    hydra = Path(arguments["hydra.run.dir"]) / ".hydra"
    hydra.mkdir(parents=True)
    blocks = "{enabled: true, ablate_at_deployment: false}"
    hydra.joinpath("config.yaml").write_text(
        f"trainer: {{total_training_steps: {steps}}}\\n"
        f"grad_routing: {{seed: 3, control: false, detector: {{name: constant}}, blocks: {blocks}}}\\n"
    )
    # a daemon of a daemon, in a session of its own, deaf to SIGTERM, as Ray's and vLLM's are
    deaf = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)  # {mark}"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-c", parent], check=True)
    shared = open(f"/dev/shm/{mark}", "w+b")
    shared.truncate(4096)
    memory = mmap.mmap(shared.fileno(), 4096)
    (Path(os.environ["TMPDIR"]) / "socket").write_text(mark)
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "data": {"hack/rate": 0.5}}) + "\\n")
            file.flush()
            time.sleep(0.1)
            if mode == "fail" and step == 2:
                print("(TaskRunnerV1 pid=7) ValueError: seen by an actor")
                time.sleep(2)  # what is mapped is looked up from time to time, and this run is short
                raise RuntimeError("out of luck")
            if mode == "hang" and step == 2:
                time.sleep(600)
            if mode == "short" and step == 2:
                break
"""


@pytest.fixture
def trainer(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "trainer.py"
    path.write_text(textwrap.dedent(TRAINER))
    return (sys.executable, str(path))


@pytest.fixture
def mark() -> str:
    return f"vgr-test-{uuid.uuid4().hex}"


def settings(mark: str, mode: str = "finish", steps: int = 5) -> list[str]:
    return [f"trainer.total_training_steps={steps}", f"mode={mode}", f"mark={mark}"]


def left_behind(mark: str) -> list[str]:
    """Processes, shared memory and temporary folders that carry the run's mark."""
    left = []
    for process in psutil.process_iter(["cmdline"]):
        if any(mark in word for word in process.info["cmdline"] or []) and process.pid != os.getpid():
            left.append(f"process {process.pid} {process.info['cmdline']}")
    left += [str(path) for path in Path("/dev/shm").glob(f"*{mark}*")]
    for path in Path("/tmp").glob("vgr-*/socket"):
        with contextlib.suppress(FileNotFoundError):  # another test's, just deleted
            left += [str(path)] if path.read_text() == mark else []
    return left


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "POLL_S", 0.05)
    monkeypatch.setattr(launcher, "PATIENCE_S", 0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
class TestProcesses:
    def test_a_run_is_recorded_and_reused(self, tmp_path: Path, trainer, mark: str, capsys) -> None:
        run = launch("off", tmp_path / "run", settings(mark), 60, trainer=trainer)
        assert run.curve("hack/rate").steps.tolist() == [1, 2, 3, 4, 5]
        record = run.record
        assert (record.preset, record.seed, record.steps, record.detector) == ("off", 3, 5, "constant")
        assert record.ablates is False and record.control is False
        assert record.overrides == tuple(settings(mark)) and "+grad_routing=off" in record.command
        assert record.peak_rss_bytes and record.peak_private_bytes and record.wall_s and record.versions
        assert record.peak_private_bytes <= record.peak_rss_bytes
        assert not left_behind(mark)
        out, err = capsys.readouterr()
        assert out == "" and "off: step 5/5, hack rate 0.50" in err and "off: finished in" in err

        again = launch("off", tmp_path / "run", settings(mark), 60, trainer=("false",))
        assert again.record == record and "reused" in capsys.readouterr().err
        with pytest.raises(UserError, match="finished run with other settings"):
            launch("off", tmp_path / "run", settings(mark, steps=6), 60, trainer=trainer)
        replaced = launch("off", tmp_path / "run", settings(mark, steps=3), 60, trainer=trainer, replace=True)
        assert replaced.last_step == 3

    def test_a_failure_quotes_the_error_and_the_log(self, tmp_path: Path, trainer, mark: str) -> None:
        with pytest.raises(UserError) as caught:
            launch("off", tmp_path / "run", settings(mark, "fail"), 60, trainer=trainer)
        text = str(caught.value)
        assert "exit status 1" in text and "RuntimeError: out of luck" in text and "log.txt" in text
        assert "\n" not in text and not left_behind(mark)
        assert Record.read(tmp_path / "run") is None
        with pytest.raises(UserError, match="did not finish"):
            launch("off", tmp_path / "run", settings(mark), 60, trainer=trainer)

    def test_the_time_limit_ends_everything(self, tmp_path: Path, trainer, mark: str) -> None:
        with pytest.raises(UserError, match=r"limit_s=8: off had done 2 of 5 steps"):
            launch("off", tmp_path / "run", settings(mark, "hang"), 8, trainer=trainer)
        assert not left_behind(mark)

    def test_an_early_end_is_no_success(self, tmp_path: Path, trainer, mark: str) -> None:
        with pytest.raises(UserError, match="step 2 of 5"):
            launch("off", tmp_path / "run", settings(mark, "short"), 60, trainer=trainer)

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_nothing_outlives_its_launcher(self, tmp_path: Path, trainer, mark: str, signum: int) -> None:
        script = "from verl_grad_routing.compare import launch as launcher; launcher.PATIENCE_S = 0.5; "
        run, overrides = str(tmp_path / "run"), settings(mark, "hang")
        script += f"launcher.launch('off', {run!r}, {overrides!r}, 60, trainer={trainer!r})"
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        metrics = tmp_path / "run" / "metrics.jsonl"
        _until(lambda: metrics.is_file() and metrics.read_text().count("\n") == 2, 20)
        assert left_behind(mark)
        process.send_signal(signum)
        assert process.wait(30) != 0
        _until(lambda: not left_behind(mark), 20)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        launch("off", tmp_path, [], 60, trainer=("false",), replace=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Traceback (most recent call last):", "  File x", "ValueError: a", ""], "ValueError: a"),
        (["pkg.errors.UserError: k='v': fix", "(raylet) later noise"], "pkg.errors.UserError: k='v': fix"),
        (["\x1b[36m(W pid=1, ip=::)\x1b[0m torch.OutOfMemoryError: big", "bye"], "torch.OutOfMemoryError: big"),
        (["ray.exceptions.RayTaskError(UserError): ray::x"], "ray.exceptions.RayTaskError(UserError): ray::x"),
        (
            ["/a.py: UserWarning: ValueError: not it", "actor.strategy='fsdp': use fsdp2"],
            "actor.strategy='fsdp': use fsdp2",
        ),
        ([], "the log is empty"),
    ],
)
def test_last_error(tmp_path: Path, lines: list[str], expected: str) -> None:
    log = tmp_path / "log.txt"
    log.write_text("\n".join(lines))
    assert last_error(log) == expected


def test_quoting_survives_hydra() -> None:
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    for value in ("/a/b-c_d.e", "/with space/and,comma", "/it's/{odd}=x"):
        assert parser.parse_override(f"k={quoted(value)}").value() == value


def test_scratch_is_short_however_long_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    scratch = launcher._scratch()
    scratch.rmdir()
    assert len(str(scratch)) <= launcher.LONGEST_SCRATCH and not list(long.iterdir())


def test_seeds_are_real_keys() -> None:
    hydra = pytest.importorskip("hydra")
    verl = importlib.util.find_spec("verl")  # found, not imported: that takes seconds
    if verl is None or verl.origin is None:
        pytest.skip("verl is not installed")
    overrides = ["+grad_routing.seed=0", "+grad_routing.blocks.seed=0", *seed_overrides(7)]
    with hydra.initialize_config_dir(str(Path(verl.origin).parent / "trainer" / "config"), version_base=None):
        config = hydra.compose("ppo_trainer", overrides)
    assert config.data.seed == config.actor_rollout_ref.rollout.seed == 7


def _until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)


def test_the_versions_are_the_same_before_and_after_the_plugin_is_loaded() -> None:
    code = (
        "from verl_grad_routing.compare.record import versions; before = versions(); import verl; "
        "from verl_grad_routing.training import vllm_metadata; vllm_metadata.install(); assert versions() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
