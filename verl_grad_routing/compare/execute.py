"""``vgr compare``: runs the cells of a grid that are not finished yet, several at once where the machine allows.

What is finished is never run again and never touched; what was killed goes on or starts over; what fails is written
down and the others go on.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from verl_grad_routing.compare import cells as grid_cells
from verl_grad_routing.compare import results
from verl_grad_routing.compare.cells import Cell
from verl_grad_routing.compare.grid import Grid, load_grid
from verl_grad_routing.compare.job_numbers import reserved
from verl_grad_routing.compare.launch import TRAINER, launch
from verl_grad_routing.compare.runs import load_run
from verl_grad_routing.errors import UserError

LOCK = ".lock"
PATHS = re.compile(r"(?<![\w:/.])(?:/[\w.@+-]+)+/([\w.@+-]+)")  # absolute ones, and their last part
Sizes = Mapping[tuple[str, str], Mapping[str, float | None]]  # see cells.check_configurations


@dataclass(frozen=True)
class Outcome:
    """How a comparison ended: its results folder, and the cells that failed."""

    results: Path
    failed: tuple[str, ...]


def run_grid(path: Path | str, to: Path | str | None = None, *, trainer: Sequence[str] = TRAINER) -> Outcome:
    """Run every cell of the grid in the file ``path`` that has not finished yet.

    Each cell has its run folder ``TO/<environment>/<arm>/seed-<n>`` (see ``runs``) and its result in ``TO/results``.
    Ctrl-C, or the death of this process, ends every process of every cell.

    Args:
        path: A grid file, see ``grid.Grid``.
        to: Folder of the comparison; the grid's name by default.
        trainer: The program, for tests; configurations are then not composed beforehand.

    Raises:
        UserError: Anything wrong with the grid, another comparison at work in ``to``, or a cell's folder that holds
            a finished run of other settings or a checkpoint of one; nothing has started then. A cell that fails raises
            nothing.
    """
    path = Path(path)
    grid = load_grid(path)
    out = Path(to or grid.name).resolve()
    environments = [grid_cells.locate(place, out, path.resolve().parent) for place in grid.environments]
    cells = grid_cells.cells_of(grid, environments, out)
    _refuse_one_queue(grid)
    sizes = grid_cells.check_configurations(cells) if tuple(trainer) == TRAINER else {}
    with _alone(out):
        for built in environments:
            grid_cells.build(built)
        folder = out / results.RESULTS
        done = grid_cells.finished(cells)
        told = [cell for cell in cells if results.already_told(folder, cell)]
        results.write_grid(folder, grid)
        failed = [cell.name for cell in done if not _collect(folder, cell, keep=cell in told)]
        left = [cell for cell in cells if cell not in done and cell not in told]
        jobs, why = affordable(grid)
        before = len(cells) - len(left)
        print(f"{grid.name}: {len(cells)} cells, {before} finished before, {why}", file=sys.stderr)
        failed += _Runner(grid, folder, jobs, sizes, trainer).run(left)
    return Outcome(folder, tuple(failed))


def _refuse_one_queue(grid: Grid) -> None:
    """TransferQueue, which carries verl's rollouts, is one per Ray: runs at once on one would train on each other's."""
    if grid.jobs > 1 and grid.ray_address is not None:
        fix = "set 1 with a ray_address: verl's TransferQueue is one per Ray, and runs at once would mix rollouts"
        raise UserError("jobs", grid.jobs, fix)


def affordable(grid: Grid) -> tuple[int, str]:
    """How many cells run at once, and a line that says why: no more than asked, than cores and than free memory."""
    if grid.ray_address is not None:
        return 1, f"1 at a time on the cluster {grid.ray_address}"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    gib = psutil.virtual_memory().available / 2**30
    jobs = max(1, min(grid.jobs, cores // grid.cores_per_cell, int(gib / grid.memory_gib_per_cell)))
    needs = f"a cell takes {grid.cores_per_cell} and {grid.memory_gib_per_cell:g} GiB"
    return jobs, f"{jobs} at a time (jobs: {grid.jobs}; {cores} cores and {gib:.0f} GiB are there, {needs})"


def show(outcome: Outcome) -> None:
    """Print the main tables on standard output, and what to do next."""
    from verl_grad_routing.compare.contrasts import COMPARED, claims
    from verl_grad_routing.compare.grid_tables import arms_table, contrast_table, grid_notes, status_table
    from verl_grad_routing.compare.terminal import console, print_tables

    found, out = results.load_results(outcome.results), console()
    print_tables([status_table(found)], out)
    for place in (entry["name"] for entry in found.grid["environments"]):
        if found.of(place):
            print_tables([arms_table(found, place), *(contrast_table(found, place, each) for each in COMPARED)], out)
            for claim in claims(found, place):
                out.print(f"{claim.mark} {claim.text}", markup=False)
    for note in grid_notes(found):
        out.print(note, style="dim", markup=False)
    for failure in found.failures:
        print(f"failed: {failure.environment}/{failure.arm}/seed-{failure.seed}: {failure.error}")
    print(f"results: {outcome.results}\nreport: vgr report {outcome.results} --to DIR")


class _Runner:
    """The pool: one thread a cell, each thread one ``launch``."""

    def __init__(self, grid: Grid, folder: Path, jobs: int, sizes: Sizes, trainer: Sequence[str]):
        self.grid, self.folder, self.jobs, self.sizes, self.trainer = grid, folder, jobs, sizes, trainer
        self.stop = threading.Event()

    def run(self, cells: Sequence[Cell]) -> list[str]:
        """All of them; returns the names of those that failed."""
        with ThreadPoolExecutor(max_workers=self.jobs) as pool:
            try:
                futures = {pool.submit(self._one, cell): cell for cell in cells}
                return [futures[future].name for future in _as_they_end(futures) if not future.result()]
            except BaseException:  # Ctrl-C, or a defect of ours in one cell: the others must not go on unseen
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _one(self, cell: Cell) -> bool:
        if self.stop.is_set():
            raise KeyboardInterrupt
        (self.folder / cell.result_name).unlink(missing_ok=True)  # an earlier failure's; now it is unfinished
        try:
            with self._starter(cell) as starter:
                launch(
                    cell.arm.preset,
                    cell.folder,
                    cell.overrides,
                    self.grid.limit_s,
                    inputs=[cell.manifest],
                    places=cell.places,
                    replace=True,  # what is there is unfinished: finished cells were sorted out before
                    resume_steps=self.grid.steps if self.grid.save_every else 0,
                    name=cell.name,
                    stop=self.stop,
                    bar=self.jobs == 1,
                    starter=starter,
                    trainer=self.trainer,
                )
        except UserError as error:
            return _failed(self.folder, cell, error)
        return _collect(self.folder, cell)

    @contextmanager
    def _starter(self, cell: Cell) -> Iterator[list[str]]:
        """A Ray with a job of a number that nobody on this machine has; verl starts its own where that is the first."""
        sizes = self.sizes.get((cell.environment, cell.arm.name))
        if self.grid.ray_address is not None or sizes is None:
            yield []
            return
        with reserved(1 if self.jobs == 1 else 2) as number:
            own = [sys.executable, "-m", "verl_grad_routing.compare.own_ray", str(number), json.dumps(sizes)]
            yield own if number > 1 else []


def _collect(folder: Path, cell: Cell, keep: bool = False) -> bool:
    """Write the result of a finished cell; False, with the failure written down, when its run has nothing to tell.

    ``keep``: there is a result, which stands whatever has become of the run's folder.
    """
    try:
        results.write_finished(folder, cell, load_run(cell.folder))
    except UserError as error:
        if keep:
            print(f"{cell.name}: its result stands, its folder is damaged: {error}", file=sys.stderr)
            return True
        return _failed(folder, cell, error)
    return True


def _failed(folder: Path, cell: Cell, error: UserError) -> bool:
    """Write the failure down, without the names of the machine's folders, and go on; always False."""
    line = PATHS.sub(r"\1", " ".join(str(error).replace(str(folder.parent), "TO").split()))
    results.write_failed(folder, cell, line)
    print(f"{cell.name}: FAILED, the others go on: {line}", file=sys.stderr)
    return False


def _as_they_end(futures: dict[Future[bool], Cell]) -> Iterator[Future[bool]]:
    """Each when it has ended; wakes now and then, so that signals are seen."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        yield from done


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the comparison's folder; the system lets go of it however this process ends."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            fix = f"another vgr compare (process {lock.read().strip() or '?'}) works there; wait for it or end it"
            raise UserError("--to", str(out), fix) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
