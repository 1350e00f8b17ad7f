"""The tables, as rows of text: printed by rich on a terminal, written as HTML in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_grad_routing.compare.comparison import CONTROL_NOTE, arms, labels, views
from verl_grad_routing.compare.runs import Run, Validation
from verl_grad_routing.compare.statistics import CONFIDENCE
from verl_grad_routing.compare.watch import clock

NONE = "–"
WIDEST = 4  # columns of rates that a page holds side by side


@dataclass(frozen=True)
class Table:
    """Header and rows of equal length; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def transposed(self, corner: str) -> Table:
        """Rows for columns; ``corner`` heads the new first column."""
        columns = [list(column) for column in zip(self.header, *self.rows, strict=True)]
        return Table(self.title, [corner, *columns[0][1:]], columns[1:])


def rates_table(runs: Sequence[Run]) -> Table:
    """Hack and solve rate after training, as trained and as deployed."""
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        trained, deployed = (run.rates("last", deployed=d).overall for d in (False, True))
        rows.append([label, *(str(rate) for tally in (trained, deployed) for rate in (tally.hack, tally.solve))])
    header = ["run", "hack, as trained", "solve, as trained", "hack, as deployed", "solve, as deployed"]
    return Table(f"Hack and solve rate {_samples(runs)}", header, rows)


def types_table(runs: Sequence[Run]) -> Table | None:
    """Hack rate by loophole type and view; None when the samples tell no types."""
    columns: list[tuple[str, Validation]] = []
    for run, label in zip(runs, labels(runs), strict=True):
        for view, deployed in views(run):
            columns.append((f"{label}, {view}", run.rates("last", deployed=deployed)))
    known = frozenset().union(*(validation.known_types for _, validation in columns))
    types = sorted({name for _, validation in columns for name in validation.types}, key=lambda t: (t not in known, t))
    if not types:
        return None
    rows = []
    for name in types:
        cells = [str(tallies[name].hack) if name in (tallies := v.types) else NONE for _, v in columns]
        rows.append([f"{name} ({'known' if name in known else 'unknown'})", *cells])
    rows.append(["all unknown types", *(str(v.unknown.hack) if v.unknown else NONE for _, v in columns)])
    table = Table("Hack rate by loophole type", ["loophole type", *(name for name, _ in columns)], rows)
    return table if len(columns) <= WIDEST else table.transposed("run")


def cost_table(runs: Sequence[Run]) -> Table:
    """Time and memory of each run."""
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        record = run.record
        wall = clock(record.wall_s) if record.wall_s is not None else NONE
        step = run.curve("timing_s/step").values if run.has("timing_s/step") else None
        median = f"{sorted(step)[len(step) // 2]:.1f} s" if step is not None else NONE
        memory = [_gib(record.peak_private_bytes), _gib(record.peak_rss_bytes)]
        steps = f"{run.last_step}, measured from {record.resumed_from}" if record.resumed_from else str(run.last_step)
        rows.append([label, steps, wall, median, *memory])
    header = ["run", "steps", "time, min:s", "median step", "peak memory, unshared", "peak memory, summed"]
    return Table("Time and memory", header, rows)


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know to read the tables."""
    said = [f"Brackets: {CONFIDENCE:.0%} Wilson intervals over validation samples; a loophole type is known when the "
            "contrastive pairs show it."]  # fmt: skip
    if min(map(len, arms(runs).values())) == 1:
        said.append(
            "Where an arm has one seed, the intervals cover prompts and sampling, not what another seed would do."
        )
    if any(run.record.control for run in runs):
        said.append(f"{CONTROL_NOTE}.")
    return said


def _samples(runs: Sequence[Run]) -> str:
    """On how many prompts, after how many steps; ranges where runs differ."""
    last = [run.rates("last", deployed=False) for run in runs]
    samples, steps = (sorted(set(values)) for values in ((v.overall.hack.total for v in last), (v.step for v in last)))
    return f"on {_range(samples)} validation samples after {_range(steps)} steps"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"


def _gib(count: int | None) -> str:
    return f"{count / 2**30:.1f} GiB" if count is not None else NONE
