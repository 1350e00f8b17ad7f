"""``vgr combinations`` and ``vgr scorecard``: tables that the code tells of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ToFile = Annotated[Path | None, typer.Option("--to", help="Write the page to this file; printed otherwise.")]
Runs = Annotated[list[Path] | None, typer.Argument(help="Results of vgr compare, or run folders, to take costs from.")]


def combinations(to: ToFile = None) -> None:
    """Which detector drives which intervention, and why not; methods of installed packages included."""
    from verl_grad_routing.combinations import combinations_page
    from verl_grad_routing.registry import load_external_methods

    load_external_methods()
    _write(combinations_page(), to)


def scorecard(runs: Runs = None, to: ToFile = None) -> None:
    """What every method needs and assumes, from the code's own declarations; costs from runs."""
    from verl_grad_routing.scorecard import scorecard_page

    _write(scorecard_page(runs or []), to)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(combinations)
    app.command()(scorecard)


def _write(page: str, to: Path | None) -> None:
    if to is None:
        print(page, end="")
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(page, encoding="utf-8")
