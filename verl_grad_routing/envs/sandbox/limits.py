"""What one verdict may use. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from verl_grad_routing.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Limits of one verdict; what goes over one fails the candidate, never the pool.

    Attributes:
        wall_s: Seconds from the moment the candidate is handed over.
        cpu_s: Processor seconds of each process. Fairer than ``wall_s`` on a busy machine, so set it below.
        memory_mb: Address space of each process, MiB.
        processes: Processes and threads in the sandbox; its own two count.
        files: Open files of each process.
        file_mb: Largest file, MiB; also the size of the tmpfs that holds them all.
        output_kb: Largest report of the returned values, KiB.
        start_s: Seconds for the sandbox itself to start.
    """

    wall_s: float = 10.0
    cpu_s: int = 4
    memory_mb: int = 512
    processes: int = 4
    files: int = 32
    file_mb: int = 8
    output_kb: int = 256
    start_s: float = 30.0

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            whole = field not in ("wall_s", "start_s")
            if type(value) is bool or not isinstance(value, int if whole else (int, float)) or value <= 0:
                raise UserError(f"limits.{field}", value, f"use a positive {'whole ' if whole else ''}number")
        if self.processes < 3:
            raise UserError("limits.processes", self.processes, "use at least 3; the sandbox itself takes two")
        if self.memory_mb < 64:
            raise UserError("limits.memory_mb", self.memory_mb, "use at least 64; the interpreter itself needs some")
