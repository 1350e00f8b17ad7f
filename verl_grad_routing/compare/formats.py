"""A table as Markdown, HTML, LaTeX and CSV: the same bytes for the same rows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from html import escape

from verl_grad_routing.compare.tables import Table

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "†": r"\textdagger{}",
    "–": "--",
    "−": "$-$",
    "[": "{[}",  # after a line break LaTeX would read it as an option
}


def to_markdown(table: Table) -> str:
    """A pipe table: the first column to the left, numbers to the right."""
    rows = [table.header, [":--", *("--:" for _ in table.header[1:])], *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return f"**{table.title}**\n\n" + "\n".join(lines) + "\n"


def to_html(table: Table, text: bool = False) -> str:
    """A ``<table>`` in a box that scrolls; ``text`` for cells of words, which wrap."""
    kind = ' class="text"' if text else ""
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name in table.header)
    rows = "".join("<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def to_latex(table: Table) -> str:
    """A ``table`` with booktabs rules; needs ``\\usepackage{booktabs}``."""
    lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in [table.header, *table.rows]]
    head, *body = lines
    columns = "l" + "r" * (len(table.header) - 1)
    parts = [rf"\caption{{{_latex(table.title)}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
    return "\n".join(
        [r"\begin{table}", r"\centering", *parts, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    )


def to_csv(table: Table) -> str:
    """Comma-separated, header first, lines end in a line feed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
    return text.getvalue()


FORMATS: dict[str, Callable[[Table], str]] = {
    "md": to_markdown,
    "html": lambda table: to_html(table) + "\n",
    "tex": to_latex,
    "csv": to_csv,
}


def slug(title: str) -> str:
    """A file name of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
