"""``vgr bench routing``: one ``update_actor`` of each way to route against its unrouted counterpart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def routing(
    json: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
    row: Annotated[list[str] | None, typer.Option("--row", help="Measure these rows alone; all by default.")] = None,
    repeats: Annotated[
        int, typer.Option(min=3, help="Pairs per row; 4 times as many if these leave the bound open.")
    ] = 100,
    keep_memory: Annotated[
        bool, typer.Option(help="Let the process keep what it frees; otherwise glibc gives some of it back.")
    ] = True,
) -> None:
    """One update of the actor under each preset against the unrouted one, in turns; exit status 1 over a bound."""
    from verl_grad_routing.bench.routing import run_routing_bench

    results = run_routing_bench(json_path=json, names=row, repeats=repeats, keep_memory=keep_memory)
    if not all(found["within_bound"] for found in results["rows"].values()):
        raise typer.Exit(1)
