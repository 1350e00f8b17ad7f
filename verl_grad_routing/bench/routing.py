"""What each way to route costs, row by row (see ``routing_rows``): both sides in turns, in one process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from verl_grad_routing.bench.memory import keep_freed_memory
from verl_grad_routing.bench.routing_rows import ROWS
from verl_grad_routing.bench.statistics import RatioInterval, measure_against
from verl_grad_routing.bench.step import CPU_THREADS, prepare, timed
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest


def run_routing_bench(
    json_path: Path | None = None, names: Sequence[str] | None = None, repeats: int = 100, keep_memory: bool = True
) -> dict[str, Any]:
    """Measure, print one line a row, and write all samples so far to ``json_path``.

    Args:
        json_path: File for the numbers.
        names: Rows to measure; all if not given.
        repeats: Pairs of measurements of a row; four times as many where these do not decide, see ``measure_against``.
        keep_memory: Whether the process keeps what it frees, see ``bench.memory``.

    Returns:
        ``rows``: name -> median ratio, interval, bound, whether the interval's upper end is within it and its lower
        end over it, samples in seconds; beside the device and whether freed memory was kept.

    Raises:
        UserError: An unknown row.
    """
    import verl  # noqa: F401  (loads the plugin: the CPU platform must exist before any engine module)

    for name in names or ():
        if name not in ROWS:
            raise UserError("--row", name, nearest(name, list(ROWS)))
    torch.set_num_threads(CPU_THREADS)
    keeps = keep_memory and keep_freed_memory()
    rows: dict[str, Any] = {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {CPU_THREADS} thread"
    results = {"rows": rows, "device": device, "torch": torch.__version__, "keeps_freed_memory": keeps}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name in names or ROWS:
            row = ROWS[name]
            torch.manual_seed(0)
            routed, plain = row.routed(Path(folder)), row.plain(Path(folder))
            sides = (lambda work=routed: timed(work), lambda work=plain: timed(work))
            ratio, a, b = measure_against(row.bound, *sides, repeats)
            within, told = ratio.high <= row.bound, verdict(ratio, row.bound)
            rows[name] = {**ratio.as_dict(), "against": row.against, "bound": row.bound, "within_bound": within}
            rows[name]["over_bound"] = ratio.low > row.bound  # neither: its interval holds the bound
            rows[name] |= {"routed_s": a, "plain_s": b}
            print(f"{name:16} / {row.against}: {ratio}, bound {row.bound}{told}", flush=True)
            if json_path is not None:  # after every row: one takes minutes
                Path(json_path).write_text(json.dumps(results, indent=2))
        torch.distributed.destroy_process_group()
    return results


def verdict(ratio: RatioInterval, bound: float) -> str:
    """What a line says of a ratio that is not shown to be within its bound; nothing of one that is."""
    if ratio.high <= bound:
        return ""
    return ": EXCEEDED" if ratio.low > bound else f": UNDECIDED by {ratio.pairs} pairs, the bound is in the interval"
