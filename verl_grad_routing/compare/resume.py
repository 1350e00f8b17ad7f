"""A run that was cut short goes on from its last checkpoint, and its metrics stay one sequence.

verl's file logger empties the metrics file when it starts, so what came before the checkpoint is set aside first and
put back when the run has finished.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from verl_grad_routing.compare.runs import METRICS

ATTEMPT, EARLIER, CHECKPOINTS = "attempt.json", "metrics.earlier.jsonl", "checkpoints"
LATEST = "latest_checkpointed_iteration.txt"  # verl's


def note_attempt(folder: Path, settings_hash: str) -> None:
    """Leave word of what is being run, for whoever finds the folder unfinished."""
    (folder / ATTEMPT).write_text(json.dumps({"settings_hash": settings_hash}) + "\n", encoding="utf-8")


def resumable(folder: Path, settings_hash: str, steps: int) -> int:
    """Step of the checkpoint from which an unfinished run with these settings can go on; 0 when there is none.

    A checkpoint of the last step does not count: there would be nothing left to train, and nothing to validate after.
    """
    attempt, latest = folder / ATTEMPT, folder / CHECKPOINTS / LATEST
    try:
        same = json.loads(attempt.read_text(encoding="utf-8"))["settings_hash"] == settings_hash
        step = int(latest.read_text())
    except (OSError, ValueError, KeyError):
        return 0
    whole = (folder / CHECKPOINTS / f"global_step_{step}").is_dir()
    return step if same and whole and 0 < step < steps else 0


def set_aside(folder: Path, step: int) -> None:
    """Keep the metrics up to ``step``; what came after it is trained again."""
    kept = _lines(folder / EARLIER, step) + _lines(folder / METRICS, step)
    _replace(folder / EARLIER, kept)
    (folder / METRICS).unlink(missing_ok=True)


def put_back(folder: Path, step: int) -> None:
    """The metrics of the whole run in one file again."""
    _replace(folder / METRICS, _lines(folder / EARLIER, step) + _lines(folder / METRICS))
    (folder / EARLIER).unlink()


def _lines(path: Path, last: int | None = None) -> list[str]:
    """The lines of a metrics file up to step ``last``; a line that was cut off at the end is none."""
    if not path.is_file():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    return [line for line in complete if last is None or json.loads(line)["step"] <= last]


def _replace(path: Path, lines: list[str]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(partial, path)
