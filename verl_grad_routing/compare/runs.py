"""A run folder, read back.

run.json                   what it was (``record.Record``); absent when another launcher made the run
metrics.jsonl              verl's file logger: one line {"step": N, "data": {...}} per logged step
val/N.jsonl                verl's validation samples after step N, as trained
val/deployed/N.jsonl       the same with the quarantine ablated; absent in runs that ablate nothing
log.txt                    output of all processes
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from verl_grad_routing.compare.record import Record
from verl_grad_routing.compare.statistics import Rate
from verl_grad_routing.errors import UserError

METRICS, VALIDATION, DEPLOYED, LOG = "metrics.jsonl", "val", "deployed", "log.txt"
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A metric against steps: ``steps`` int64 [S] ascending, ``values`` float64 [S] finite."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Tally:
    """Hack and solve rate over the same samples."""

    hack: Rate
    solve: Rate


@dataclass(frozen=True)
class Validation:
    """Rates of one validation.

    Attributes:
        step: Training steps done before it.
        deployed: Of what is deployed (quarantine ablated); otherwise as trained.
        overall: Over all samples.
        known: Over prompts whose loophole type the contrastive pairs show; None when there are none.
        unknown: Over the other prompts; None when there are none.
        types: By loophole type, known ones first.
        known_types: The types that the pairs show.
    """

    step: int
    deployed: bool
    overall: Tally
    known: Tally | None
    unknown: Tally | None
    types: dict[str, Tally]
    known_types: frozenset[str]


@dataclass(frozen=True)
class Run:
    """A run; see the module's docstring for its folder.

    Attributes:
        folder: Where it is.
        record: What it was.
        rows: Metrics per step, ascending; absent and null values are left out.
    """

    folder: Path
    record: Record
    rows: dict[int, dict[str, float]]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @cached_property
    def keys(self) -> list[str]:
        """Every metric of the run."""
        return sorted(set().union(*self.rows.values()))

    def has(self, key: str) -> bool:
        """Whether the metric was logged with a finite value at any step."""
        return key in self.keys

    def curve(self, key: str) -> Curve:
        """The metric ``key`` at the steps that logged it. Raises ``UserError`` when none did."""
        if not self.has(key):
            close = difflib.get_close_matches(key, self.keys, n=3, cutoff=0.4)
            raise UserError(
                f"{self.folder / METRICS}: metric", key, f"never logged; nearest: {', '.join(close) or '-'}"
            )
        points = [(step, data[key]) for step, data in self.rows.items() if key in data]
        steps, values = zip(*points, strict=True)
        return Curve(np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64))

    @property
    def last_step(self) -> int:
        """The last step logged."""
        return max(self.rows)

    @property
    def ablates(self) -> bool:
        """Whether deployment deletes something, so that as trained and as deployed differ."""
        if self.record.ablates is not None:
            return self.record.ablates
        return (self.folder / VALIDATION / DEPLOYED).is_dir()  # the trainer makes it whenever it ablates

    @cached_property
    def validation_steps(self) -> list[int]:
        """Steps after which samples were dumped, ascending. Raises ``UserError`` when there are none."""
        steps = sorted(int(p.stem) for p in (self.folder / VALIDATION).glob("*.jsonl") if p.stem.isdigit())
        if not steps:
            fix = "no samples there; train with trainer.validation_data_dir set to it and trainer.test_freq above 0"
            raise UserError("trainer.validation_data_dir", str(self.folder / VALIDATION), fix)
        return steps

    def rates(self, step: int | Literal["first", "last"] = "last", *, deployed: bool) -> Validation:
        """Rates of the validation after ``step``, counted from the dumped samples.

        Args:
            step: A step in ``validation_steps``, or ``first`` or ``last`` of them.
            deployed: As deployed; the same samples as trained where nothing is ablated.

        Raises:
            UserError: No such validation, or samples without the facts ``hack`` and ``solve``.
        """
        steps = self.validation_steps
        chosen = {"first": steps[0], "last": steps[-1]}.get(step, step) if isinstance(step, str) else step
        if chosen not in steps:
            raise UserError("step", step, f"{self.folder} was validated after steps {', '.join(map(str, steps))}")
        key = (int(chosen), deployed)
        if key not in self._counted:
            self._counted[key] = self._count(*key)
        return self._counted[key]

    @cached_property
    def _counted(self) -> dict[tuple[int, bool], Validation]:
        return {}

    def _count(self, step: int, deployed: bool) -> Validation:
        folder = self.folder / VALIDATION
        path = (folder / DEPLOYED if deployed and self.ablates else folder) / f"{step}.jsonl"
        samples = [_checked(sample, path, number) for number, sample in _json_lines(path)]
        if not samples:
            raise UserError("validation samples", str(path), "empty; run again")
        by_type: dict[str, list[Sample]] = {}
        by_known: dict[bool, list[Sample]] = {}
        for sample in samples:
            if sample.get("loophole"):
                by_type.setdefault(sample["loophole"], []).append(sample)
            if sample.get("known") is not None:
                by_known.setdefault(bool(sample["known"]), []).append(sample)
        known_types = frozenset(sample["loophole"] for sample in by_known.get(True, []) if sample.get("loophole"))
        ordered = sorted(by_type, key=lambda name: (name not in known_types, name))
        return Validation(
            step=step,
            deployed=deployed,
            overall=_tally(samples),
            known=_tally(by_known[True]) if True in by_known else None,
            unknown=_tally(by_known[False]) if False in by_known else None,
            types={name: _tally(by_type[name]) for name in ordered},
            known_types=known_types,
        )


def load_run(folder: Path | str) -> Run:
    """Read a run folder. Raises ``UserError`` when it holds no metrics or damaged ones."""
    folder = Path(folder).resolve()
    path = folder / METRICS
    rows: dict[int, dict[str, float]] = {}
    for number, line in _json_lines(path):
        fields = line if isinstance(line, dict) else {}
        if not isinstance(fields.get("step"), int) or not isinstance(fields.get("data"), dict):
            raise UserError(f"{path}:{number}", str(line)[:80], 'not {"step": N, "data": {...}} of verl\'s file logger')
        # verl logs a step in parts: its validation apart from its training
        rows.setdefault(line["step"], {}).update(_finite(line["data"]))
    if not rows:
        raise UserError("run", str(path), "no steps logged; did the run fail? see log.txt beside it")
    record = Record.read(folder) or Record(preset=folder.name)
    return Run(folder, record, dict(sorted(rows.items())))


def _finite(data: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of ``data``; verl's logger writes NaN as null."""
    return {key: float(value) for key, value in data.items() if isinstance(value, int | float) and np.isfinite(value)}


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        fix = (
            f"no such file, so no finished run; train with trainer.logger='[console,file]', trainer.test_freq above 0, "
            f"trainer.validation_data_dir=RUN/{VALIDATION} and, in the environment, VERL_FILE_LOGGER_PATH=RUN/{METRICS}"
        )
        raise UserError("run", str(path), fix)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError:
                raise UserError(f"{path}:{number}", line.strip()[:80], "not JSON; was the run cut short?") from None


def _checked(sample: Any, path: Path, number: int) -> Sample:
    for fact in ("hack", "solve"):
        value = sample.get(fact) if isinstance(sample, dict) else None
        if value not in (0, 1):
            fix = "must be 0 or 1: the reward function returns it for every sample, beside score"
            raise UserError(f"{path}:{number}: {fact}", value, fix)
    return sample


def _tally(samples: Sequence[Sample]) -> Tally:
    hack, solve = (Rate(sum(int(sample[fact]) for sample in samples), len(samples)) for fact in ("hack", "solve"))
    return Tally(hack, solve)
