"""Tables on a terminal, or as plain text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from verl_grad_routing.compare.tables import Table


def console() -> Console:
    """Standard output; in a pipe wide enough for the tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def print_tables(tables: Iterable[Table | None], to: Console) -> None:
    """Print each table there is."""
    for table in tables:
        if table is None:
            continue
        rich = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        for index, name in enumerate(table.header):
            rich.add_column(Text(name), justify="left" if index == 0 else "right")
        for row in table.rows:
            rich.add_row(*(Text(cell) for cell in row))
        to.print(rich)
