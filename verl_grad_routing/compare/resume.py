"""A run that was cut short goes on from its last checkpoint, and its metrics stay one sequence.

verl's file logger empties the metrics file when it starts, so what came before the checkpoint is set aside first and
put back when the run has finished.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from verl_grad_routing.compare.runs import METRICS

ATTEMPT, EARLIER, CHECKPOINTS = "attempt.json", "metrics.earlier.jsonl", "checkpoints"
LATEST, STEP, ACTOR = "latest_checkpointed_iteration.txt", "global_step_", "actor"  # verl's


def note_attempt(folder: Path, settings_hash: str) -> None:
    """Leave word of what is being run, for whoever finds the folder unfinished."""
    _replace(folder / ATTEMPT, [json.dumps({"settings_hash": settings_hash})])


def resumable(folder: Path, settings_hash: str, steps: int) -> int:
    """Step of the last checkpoint from which an unfinished run with these settings can go on; 0 when there is none.

    A checkpoint of the last step does not count: there would be nothing left to train, and nothing to validate after.
    """
    if attempted(folder) != settings_hash:
        return 0
    return max((step for step in checkpoints(folder) if step < steps), default=0)


def attempted(folder: Path) -> str | None:
    """Settings hash of the run that was last started in ``folder``; None when that is not known."""
    try:
        return str(json.loads((folder / ATTEMPT).read_text(encoding="utf-8"))["settings_hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checkpoints(folder: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, ascending: verl writes down the latest when it is complete."""
    try:
        latest = int((folder / CHECKPOINTS / LATEST).read_text())
    except (OSError, ValueError):
        return []
    # of one that verl has made room from only the data loader's state is left
    whole = (path.parent for path in (folder / CHECKPOINTS).glob(f"{STEP}*/{ACTOR}") if path.is_dir())
    names = (path.name.removeprefix(STEP) for path in whole)
    return sorted(int(name) for name in names if name.isdecimal() and 0 < int(name) <= latest)


def set_aside(folder: Path, step: int) -> None:
    """Go on from ``step``: keep the metrics up to it, and forget later checkpoints; what came after is done again."""
    if later := [each for each in checkpoints(folder) if each > step]:
        _replace(folder / CHECKPOINTS / LATEST, [str(step)])
        for each in later:
            shutil.rmtree(folder / CHECKPOINTS / f"{STEP}{each}")
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
