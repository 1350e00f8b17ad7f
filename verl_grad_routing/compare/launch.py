"""Starts one training run as a subprocess, watches it, and leaves a run folder (see ``runs``) or a one-line error."""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from verl_grad_routing.compare import record as records
from verl_grad_routing.compare import resume as resuming
from verl_grad_routing.compare.record import Record
from verl_grad_routing.compare.resume import CHECKPOINTS
from verl_grad_routing.compare.runs import LOG, METRICS, VALIDATION, Run, load_run
from verl_grad_routing.compare.watch import MetricsTail, State, clock, progress
from verl_grad_routing.errors import UserError

TRAINER = (sys.executable, "-m", "verl.trainer.main_ppo")
HYDRA, PROCESSES = "hydra", "processes.json"
ATTEMPTS = (LOG, HYDRA, PROCESSES)  # what each start of a run writes anew
OURS = (records.FILE_NAME, METRICS, VALIDATION, CHECKPOINTS, resuming.ATTEMPT, resuming.EARLIER, *ATTEMPTS)
# Ray's sockets lie below its temporary folder and add up to 66 characters; the system allows 107 in all.
LONGEST_SCRATCH = 40
POLL_S = 0.5
PATIENCE_S = 10.0  # for verl to shut down in order
STOP_S = 60.0  # the supervisor's work adds up to about half of this
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
ACTOR = re.compile(r"^\((?:raylet|[^()]*\bpid=)[^)]*\)\s?")
ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)(?:\([\w.]+\))?: \S")


def seed_overrides(seed: int) -> list[str]:
    """Overrides that give every arm the same prompts in the same order and the same draws, as far as verl allows.

    Requests carry seeds of their own where the agent loop gives them (``training.request_seeds``).
    """
    keys = (
        "data.seed",
        "grad_routing.seed",
        "grad_routing.blocks.seed",
        "actor_rollout_ref.actor.data_loader_seed",
        "actor_rollout_ref.actor.fsdp_config.seed",
        "actor_rollout_ref.rollout.seed",
    )
    return [f"{key}={seed}" for key in keys]


def launch(
    preset: str,
    to: Path | str,
    overrides: Sequence[str],
    limit_s: float,
    *,
    inputs: Iterable[Path] = (),
    places: Sequence[str] = (),
    replace: bool = False,
    resume_steps: int = 0,
    name: str | None = None,
    stop: threading.Event | None = None,
    bar: bool = True,
    starter: Sequence[str] = (),
    trainer: Sequence[str] = TRAINER,
) -> Run:
    """Train once with ``python -m verl.trainer.main_ppo +grad_routing=<preset> <overrides>``.

    A run that finished in ``to`` with the same settings is reused. Ctrl-C, the time limit and the death of this process
    end every process of the run; its temporary files go too.

    Args:
        preset: A preset, see ``vgr list presets``.
        to: Run folder.
        overrides: Hydra overrides, the same as on verl's own command line.
        limit_s: Seconds after which the run is ended.
        inputs: Files whose content decides what the run does, e.g. the environment's manifest.
        places: Further overrides that only say where things are (folders, a cluster): no part of the settings.
        replace: Delete another run in ``to``, finished or not; otherwise such a folder is refused.
        resume_steps: Training steps of the run, when an unfinished one in ``to`` may go on from its last checkpoint.
        name: In messages; the preset by default.
        stop: Ends the run when it is set, as Ctrl-C does; for threads, which Ctrl-C does not reach.
        bar: A progress bar on a terminal; otherwise lines, for several runs at once.
        starter: A program that runs the command after it, e.g. ``own_ray``; no part of the settings or the record.
        trainer: The program, for tests.

    Raises:
        UserError: The run failed, took too long, or ``to`` holds something else.
        KeyboardInterrupt: ``stop`` was set.
    """
    folder, name = Path(to).resolve(), name or preset
    wanted = records.settings_hash(preset, overrides, inputs)
    found = Record.read(folder)
    if found is not None and found.settings_hash == wanted:
        print(f"{name}: reused, {folder} holds a finished run with the same settings", file=sys.stderr)
        return load_run(folder)
    resumed_from = resuming.resumable(folder, wanted, resume_steps)
    _make_room(folder, found, replace, resumed_from)
    resuming.note_attempt(folder, wanted)
    scratch = _scratch()
    command = [*trainer, f"+grad_routing={preset}", *_own_overrides(folder, scratch), *overrides, *places]
    made_with, started = records.made_with(), time.monotonic()
    _run(name, [*starter, *command], folder, scratch, limit_s, stop or threading.Event(), bar)
    if resumed_from:
        resuming.put_back(folder, resumed_from)
    wall_s = time.monotonic() - started
    if _code_changed(made_with["code"]):
        made_with["code"] += records.CHANGED
        print(f"{name}: the training code changed while it ran; its record says so", file=sys.stderr)
    _write_record(preset, overrides, command, folder, wanted, made_with, wall_s, resumed_from)
    print(f"{name}: finished in {clock(wall_s)}", file=sys.stderr)
    return load_run(folder)


def _code_changed(before: str) -> bool:
    try:
        return records.code_hash() != before
    except OSError:  # a file that comes or goes right now
        return True


def _own_overrides(folder: Path, scratch: Path) -> list[str]:
    """Where the run writes, and a Ray of its own; put first, so that the caller's overrides win."""
    paths = {
        "trainer.validation_data_dir": folder / VALIDATION,
        "trainer.default_local_dir": folder / CHECKPOINTS,
        "hydra.run.dir": folder / HYDRA,
        "++ray_kwargs.ray_init._temp_dir": scratch,
    }
    given = [f"{key}={quoted(str(path))}" for key, path in paths.items()]
    return ["trainer.logger=[console,file]", "++ray_kwargs.ray_init.address=local", *given]


def quoted(value: str) -> str:
    """``value`` in Hydra's override grammar."""
    if re.fullmatch(r"[\w./@+-]+", value):
        return value
    return "'" + value.replace("'", "\\'") + "'"


def _make_room(folder: Path, found: Record | None, replace: bool, resumed_from: int) -> None:
    """A run folder, empty but for what a resumed run goes on from.

    Raises ``UserError`` rather than delete what is not a run's, or is but must stay.
    """
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if present and not present & {LOG, resuming.ATTEMPT}:
        raise UserError("to", str(folder), "holds something else; name a new or empty folder")
    if present and not replace and not resumed_from:
        what = "a finished run with other settings" if found else "a run that did not finish"
        raise UserError("to", str(folder), f"holds {what}; delete it or name another folder")
    if resumed_from:
        resuming.set_aside(folder, resumed_from)
    for name in ATTEMPTS if resumed_from else OURS:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _scratch() -> Path:
    """A temporary folder with a short name, for Ray's sockets and every other temporary file of the run."""
    scratch = Path(tempfile.mkdtemp(prefix="vgr-"))
    if len(str(scratch)) > LONGEST_SCRATCH:
        scratch.rmdir()
        scratch = Path(tempfile.mkdtemp(prefix="vgr-", dir="/tmp"))
    return scratch


def _run(
    name: str, command: list[str], folder: Path, scratch: Path, limit_s: float, stop: threading.Event, bar: bool
) -> None:
    # what torch compiles for this machine outlives the run: it would cost each one half a minute
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")}
    environment = {**kept, **os.environ} | {
        "VERL_FILE_LOGGER_PATH": str(folder / METRICS),
        "TMPDIR": str(scratch),
        "HYDRA_FULL_ERROR": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0"),
    }
    supervisor = [sys.executable, "-m", "verl_grad_routing.compare.supervisor"]
    supervisor += [str(folder / PROCESSES), str(scratch), str(PATIENCE_S)]
    log = folder / LOG
    state, tail = State(), MetricsTail(folder / METRICS)
    with log.open("wb") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            [*supervisor, *command],
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        with progress(name, bar) as show:
            in_time = _watch(process, folder, state, tail, limit_s, stop, show)
    finally:
        ended = _stop(process)
        if not ended:
            print(f"{name}: processes may be left over, look for those that name {folder}", file=sys.stderr)
    if not ended:
        fix = f"its processes may be left over: look for those that name {folder}, and run again"
        raise UserError(name, f"not ended {STOP_S:.0f} s after it was told to", fix)
    if not in_time:
        fix = f"{name} had done {state.step} of {state.total or '?'} steps by then; give it more time, or see {log}"
        raise UserError("limit_s", limit_s, fix)
    if process.returncode != 0:
        raise UserError(name, f"exit status {process.returncode}", f"{last_error(log)} (the whole log: {log})")
    if state.step < (state.total or 1):
        raise UserError(name, f"step {state.step} of {state.total}", f"ended early without an error; see {log}")


def _watch(
    process: subprocess.Popen[bytes],
    folder: Path,
    state: State,
    tail: MetricsTail,
    limit_s: float,
    stop: threading.Event,
    show: Callable[[State], None],
) -> bool:
    """Show progress until the run has ended; False when its time is up first."""
    end = time.monotonic() + limit_s
    while (ended := process.poll() is not None) or time.monotonic() < end:
        if state.total is None:
            state.total = _configuration(folder).get("steps")
        tail.update(state)
        show(state)
        if ended:
            return True
        if stop.wait(POLL_S):
            raise KeyboardInterrupt
    return False


def _stop(process: subprocess.Popen[bytes]) -> bool:
    """Ask the supervisor to end everything, and wait until it has; False when it did not and was killed."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def _configuration(folder: Path) -> dict[str, Any]:
    """What this module needs of the run's configuration, as Hydra composed it; empty until Hydra has."""
    path = folder / HYDRA / ".hydra" / "config.yaml"
    if not path.is_file() or not path.read_text().endswith("\n"):
        return {}
    from omegaconf import OmegaConf

    config = OmegaConf.load(path)
    blocks = OmegaConf.select(config, "grad_routing.blocks", default={})
    return {
        "steps": OmegaConf.select(config, "trainer.total_training_steps"),
        "seed": OmegaConf.select(config, "grad_routing.seed"),
        "detector": OmegaConf.select(config, "grad_routing.detector.name"),
        "control": bool(OmegaConf.select(config, "grad_routing.control", default=False)),
        "ablates": bool(blocks.get("enabled", False) and blocks.get("ablate_at_deployment", False)),
    }


def _write_record(
    preset: str,
    overrides: Sequence[str],
    command: list[str],
    folder: Path,
    settings_hash: str,
    made_with: dict[str, Any],
    wall_s: float,
    resumed_from: int,
) -> None:
    configuration = _configuration(folder)
    processes = _processes(folder)
    total = configuration.pop("steps", None)
    Record(
        preset=preset,
        overrides=tuple(overrides),
        command=tuple(command),
        settings_hash=settings_hash,
        machine=records.machine(),
        steps=total if total is not None else load_run(folder).last_step,
        resumed_from=resumed_from or None,
        wall_s=round(wall_s, 1),
        peak_rss_bytes=processes["peak_rss_bytes"],
        peak_private_bytes=processes["peak_private_bytes"],
        **made_with,
        **configuration,
    ).write(folder)


def _processes(folder: Path) -> dict[str, int]:
    """What the supervisor leaves when it ends. Raises ``UserError`` when somebody else ended it."""
    path = folder / PROCESSES
    try:
        found: dict[str, int] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(str(path), str(error), "the run's supervisor was ended from outside; run again") from None
    return found


def last_error(log: Path, lines: int = 4000) -> str:
    """The line of a log that most probably says what went wrong.

    The last line that reads like the end of a traceback, of the driver rather than of a Ray actor, else the last line.
    """
    with log.open(encoding="utf-8", errors="replace") as file:
        tail = [COLOURS.sub("", line).rstrip() for line in deque(file, maxlen=lines)]
    texts = [line for line in tail if line]
    driver = [line for line in texts if not ACTOR.match(line)]
    for candidates in (driver, [ACTOR.sub("", line) for line in texts]):
        if found := [line for line in candidates if ERROR.match(line)]:
            return found[-1][:500]
    return (driver or texts or ["the log is empty"])[-1][:500]
