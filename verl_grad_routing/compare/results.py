"""The results of a comparison: one small JSON object per cell, and ``grid.json``, which says what cells there are.

These files are what is committed and what ``vgr report`` reads. They hold counts, not rates, and no path of any
machine. A cell is *finished* or *failed* (its last error is kept); a cell of the grid without a file is *unfinished*.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from verl_grad_routing.compare import record as records
from verl_grad_routing.compare.cells import Cell
from verl_grad_routing.compare.grid import Grid
from verl_grad_routing.compare.record import Record
from verl_grad_routing.compare.runs import Run, Tally, Validation
from verl_grad_routing.compare.statistics import Rate
from verl_grad_routing.compare.swapped import swapped_keys
from verl_grad_routing.errors import UserError

RESULTS, GRID, FORMAT = "results", "grid.json", 1
CURVES = (
    "hack/rate",
    "hack/rate_known",
    "hack/rate_unknown",
    "solve/rate",
    "routing/share_route",
    "routing/share_absorb",
    "routing/share_keep",
    "detector/auroc",
    "detector/share_flagged",
    "detector/recall",
    "intervention/head_start",
    "routing/update_share/quarantine",
    "monitor/heldout/rate",
    "monitor/heldout/recall",
    "timing_s/step",
    "timing_s/gen",
)
POINTS = 50  # steps of a curve that are kept, about
LEFT_OUT = ("command", "arm", "environment")  # of the record: it names folders of a machine; told elsewhere
KNOWN, UNKNOWN = "known", "unknown"


@dataclass(frozen=True)
class StoredRun(Run):
    """A finished cell, read back: a ``Run`` whose curves and counts come from its JSON.

    Attributes:
        stored: Validations by step and view.
        split: The data file that they are of.
        signal: The knowledge that its detector reads (``detectors.Signal``).
    """

    stored: dict[tuple[int, bool], Validation]
    split: str
    signal: str

    @cached_property
    def validation_steps(self) -> list[int]:
        """Steps after which the run was validated, ascending."""
        return sorted({step for step, _ in self.stored})

    def _count(self, step: int, deployed: bool) -> Validation:
        return self.stored[step, deployed and self.ablates]


@dataclass(frozen=True)
class Failure:
    """A cell that failed, and the line that says why."""

    environment: str
    arm: str
    seed: int
    error: str


@dataclass(frozen=True)
class Results:
    """A results folder. ``grid`` is ``grid.json`` as plain data; ``extra`` names files of cells that it lacks."""

    grid: dict[str, Any]
    runs: list[StoredRun]
    failures: list[Failure]
    extra: list[str]

    @property
    def arms(self) -> list[str]:
        """In the grid's order."""
        return [arm["name"] for arm in self.grid["arms"]]

    def cells(self) -> list[tuple[str, str, int]]:
        """Every cell of the grid: environment, arm, seed."""
        places = [place["name"] for place in self.grid["environments"]]
        return [(place, arm, seed) for place in places for arm in self.arms for seed in self.grid["seeds"]]

    def of(self, environment: str) -> list[StoredRun]:
        """The finished runs there, in the order of the grid's arms and seeds."""
        order = {cell: index for index, cell in enumerate(self.cells())}
        found = [run for run in self.runs if run.record.environment == environment]
        return sorted(found, key=lambda run: order[_cell_of(run.record)])

    def unfinished(self) -> list[tuple[str, str, int]]:
        """Cells without a result."""
        known = {_cell_of(run.record) for run in self.runs} | {(f.environment, f.arm, f.seed) for f in self.failures}
        return [cell for cell in self.cells() if cell not in known]


def is_results(folder: Path | str) -> bool:
    """Whether ``folder`` is one of results."""
    return (Path(folder) / GRID).is_file()


def write_grid(folder: Path, grid: Grid) -> None:
    """Write ``grid.json``: what cells there are, and which arms the others are compared with."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("name", "seeds", "steps", "reference", "control", "overrides")
    arms = [{key: getattr(arm, key) for key in ("name", "preset", "overrides")} for arm in grid.arms]
    places = [
        {key: getattr(place, key) for key in ("name", "prepare", "split", "options", "overrides")}
        | ({"prepare": None} if place.dir else {})
        for place in grid.environments
    ]
    own = {key: getattr(grid, key) for key in keys}
    _write(folder / GRID, {"format": FORMAT} | own | {"arms": arms, "environments": places})


def write_finished(folder: Path, cell: Cell, run: Run) -> None:
    """Write the result of a cell that has finished. Raises ``UserError`` when its run was never validated."""
    identity = _identity(cell, "finished", run.record.settings_hash)
    # a resumed run has been validated where it was taken up, too
    steps = [step for step in run.validation_steps if step % cell.validate_every == 0 or step == run.last_step]
    record = {key: value for key, value in asdict(run.record).items() if key not in LEFT_OUT and key not in identity}
    validations = [
        _validation(run.rates(step, deployed=deployed))
        for step in steps
        for deployed in ((False, True) if run.ablates else (False,))
    ]
    curves = {key: _curve(run, key) for key in [*CURVES, *_of_shadows(run), *swapped_keys(run)] if run.has(key)}
    own = {"signal": _signal(run.record.detector), "curves": curves, "validations": validations}
    _write(folder / cell.result_name, identity | record | own)


def already_told(folder: Path, cell: Cell) -> bool:
    """Whether ``folder`` holds the result of this cell, finished with its settings: its run folder may be gone.

    Raises:
        UserError: It is damaged, or of a finished run of other settings.
    """
    path = folder / cell.result_name
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        status, settings = found["status"], found["settings_hash"]
    except (ValueError, KeyError, TypeError):
        raise UserError(str(path), "unreadable", "no result of a cell; delete it, and the cell runs again") from None
    if status != "finished":
        return False
    if settings != cell.settings_hash:
        fix = "a finished result of other settings, versions or training code; move it away, or name another --to"
        raise UserError(cell.name, f"settings {settings}", fix)
    return True


def _of_shadows(run: Run) -> list[str]:
    return [key for key in run.keys if key.startswith("compare/")]


def write_failed(folder: Path, cell: Cell, error: str) -> None:
    """Write down that a cell failed, and how."""
    own = records.made_with() | {"error": error}
    _write(folder / cell.result_name, _identity(cell, "failed", cell.settings_hash) | own)


def load_results(folder: Path | str, allow_mixed_versions: bool = False) -> Results:
    """Read a results folder.

    Args:
        folder: With ``grid.json`` and one JSON file per cell.
        allow_mixed_versions: Accept finished cells of different package versions or training code.

    Raises:
        UserError: Damaged files, or mixed versions.
    """
    folder = Path(folder)
    grid = _read(folder / GRID)
    runs, failures, extra = [], [], []
    found = Results(grid, runs, failures, extra)
    try:
        cells = set(found.cells())
    except (KeyError, TypeError):
        raise UserError("grid.json", str(folder / GRID), "not a grid's; run vgr compare again, it writes it") from None
    for path in sorted(folder.glob("*.json")):
        if path.name == GRID:
            continue
        data = _read(path)
        try:
            if (data["environment"], data["arm"], data["seed"]) not in cells:
                extra.append(path.name)
            elif data["status"] == "failed":
                failures.append(Failure(data["environment"], data["arm"], data["seed"], data["error"]))
            else:
                runs.append(_stored(path, data))
        except (KeyError, TypeError, ValueError) as error:
            fix = "no result of a cell; delete it and run vgr compare again, which writes it from the finished run"
            raise UserError(str(path), repr(error), fix) from None
    if not allow_mixed_versions:
        _refuse_mixed(runs)
    return found


def differing(runs: Sequence[StoredRun]) -> list[str]:
    """What these runs were not all made with: names of packages, ``training code``."""
    every = [_made_with(run) for run in runs]
    keys = sorted({key for each in every for key in each})
    return [key for key in keys if len({each.get(key) for each in every}) > 1]


def _made_with(run: StoredRun) -> dict[str, str | None]:
    return {**(run.record.versions or {}), "training code": run.record.code}


def _refuse_mixed(runs: Sequence[StoredRun]) -> None:
    for run in runs:
        if str(run.record.code).endswith(records.CHANGED):
            fix = (
                "somebody edited it, so which code ran is not known; delete the cell's run folder and result, and vgr "
                "compare runs it again, or give --allow-mixed-versions, and the report says so"
            )
            raise UserError(f"{run.name}: training code", run.record.code, fix)
    for run in runs[1:]:
        first, here = _made_with(runs[0]), _made_with(run)
        for key in sorted(first.keys() | here.keys()):
            if first.get(key) != here.get(key):
                fix = (
                    f"{here.get(key)!r} in {run.name}: results of different versions do not compare; run the older "
                    "cells again in a new folder, or give --allow-mixed-versions, and the report says so"
                )
                raise UserError(f"{runs[0].name}: {key}", first.get(key), fix)


def _stored(path: Path, data: Mapping[str, Any]) -> StoredRun:
    known = {field.name for field in fields(Record)}
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key in known}
    rows: dict[int, dict[str, float]] = {}
    for key, curve in data["curves"].items():
        for step, value in zip(curve["steps"], curve["values"], strict=True):
            rows.setdefault(step, {})[key] = value
    validations = [_validation_of(entry) for entry in data["validations"]]
    stored = {(validation.step, validation.deployed): validation for validation in validations}
    return StoredRun(
        path.with_suffix(""), Record(**values), dict(sorted(rows.items())), stored, data["split"], data["signal"]
    )


def _cell_of(record: Record) -> tuple[str, str, int]:
    return str(record.environment), str(record.arm), int(record.seed or 0)


def _identity(cell: Cell, status: str, settings_hash: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "status": status,
        "arm": cell.arm.name,
        "preset": cell.arm.preset,
        "environment": cell.environment,
        "split": cell.split,
        "seed": cell.seed,
        "settings_hash": settings_hash,
    }


def _curve(run: Run, key: str) -> dict[str, list[Any]]:
    """The metric at fixed steps: the first, the last, and every so many between."""
    curve, every = run.curve(key), max(1, -(-run.last_step // POINTS))
    kept = [
        (int(step), float(f"{value:.6g}"))
        for step, value in zip(curve.steps, curve.values, strict=True)
        if step % every == 0 or step in (1, run.last_step)
    ]
    return {"steps": [step for step, _ in kept], "values": [value for _, value in kept]}


def _validation(validation: Validation) -> dict[str, Any]:
    groups = {KNOWN: validation.known, UNKNOWN: validation.unknown}
    return {
        "step": validation.step,
        "deployed": validation.deployed,
        "overall": _tally(validation.overall),
        **{name: _tally(tally) for name, tally in groups.items() if tally is not None},
        "types": {name: _tally(tally) for name, tally in validation.types.items()},
        "known_types": sorted(validation.known_types),
    }


def _tally(tally: Tally) -> dict[str, int]:
    return {"hack": tally.hack.hits, "solve": tally.solve.hits, "total": tally.hack.total}


def _validation_of(data: Mapping[str, Any]) -> Validation:
    return Validation(
        step=data["step"],
        deployed=data["deployed"],
        overall=_tally_of(data["overall"]),
        known=_tally_of(data[KNOWN]) if KNOWN in data else None,
        unknown=_tally_of(data[UNKNOWN]) if UNKNOWN in data else None,
        types={name: _tally_of(tally) for name, tally in data["types"].items()},
        known_types=frozenset(data["known_types"]),
    )


def _tally_of(data: Mapping[str, int]) -> Tally:
    return Tally(Rate(data["hack"], data["total"]), Rate(data["solve"], data["total"]))


def _signal(detector: str | None) -> str:
    from verl_grad_routing.detectors import DETECTORS
    from verl_grad_routing.registry import load_external_methods

    load_external_methods()
    return str(DETECTORS[detector].signal) if detector is not None and detector in DETECTORS else "unknown"


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("format") == FORMAT:
            return data
        raise ValueError(f"format {data.get('format') if isinstance(data, dict) else None}, wanted {FORMAT}")
    except (OSError, ValueError) as error:
        raise UserError(str(path), str(error), "unreadable; run vgr compare again, it writes results anew") from None


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """One key a line, whole or not at all."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items())
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    os.replace(partial, path)
