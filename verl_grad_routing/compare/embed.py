"""The main table of a comparison between two marks of a Markdown file: numbers that nobody types."""

from __future__ import annotations

import re
from pathlib import Path

from verl_grad_routing.compare.contrasts import by_arm
from verl_grad_routing.compare.formats import to_markdown
from verl_grad_routing.compare.grid_tables import arms_table, mark_notes, range_note
from verl_grad_routing.compare.results import Results, differing, load_results
from verl_grad_routing.errors import UserError


def embed(folder: Path | str, path: Path | str, allow_mixed_versions: bool = False) -> None:
    """Write the rates of every arm between ``<!-- results: NAME -->`` and ``<!-- end: NAME -->`` in ``path``.

    ``NAME`` is the grid's; what stood there goes. The same bytes for the same results.

    Args:
        folder: Results, see ``results``.
        path: A Markdown file with both marks, each once.
        allow_mixed_versions: See ``results.load_results``.

    Raises:
        UserError: Damaged results, no such file, or not each mark once and in order.
    """
    path, found = Path(path), load_results(folder, allow_mixed_versions)
    name = str(found.grid["name"])
    if not path.is_file():
        raise UserError("--into", str(path), "no such file")
    text = path.read_text(encoding="utf-8")
    first, last = f"<!-- results: {name} -->\n", f"<!-- end: {name} -->"
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        fix = f"put the lines {first.strip()} and {last} where the table goes, each once"
        raise UserError("--into", str(path), fix)
    block = re.compile(re.escape(first) + ".*?" + re.escape(last), re.DOTALL)
    path.write_text(block.sub(lambda _: first + _rates(found) + last, text), encoding="utf-8")


def _rates(results: Results) -> str:
    """The table of each environment that has a finished cell, and how many cells that is."""
    places = [place["name"] for place in results.grid["environments"] if results.of(place["name"])]
    tables = [f"\n{to_markdown(arms_table(results, place))}" for place in places]
    done, every = len(results.runs), len(results.cells())
    left = f", {len(results.failures)} failed" if results.failures else ""
    seeds = ", ".join(map(str, results.grid["seeds"]))
    splits = dict.fromkeys(place["split"] for place in results.grid["environments"])
    most = max((len(runs) for place in places for runs in by_arm(results.of(place)).values()), default=0)
    note = f"{done} of {every} runs (seeds {seeds}) have finished{left}. Split: {', '.join(splits)}. {range_note(most)}"
    marks = "".join(f" {text}." for text in mark_notes(results.runs))
    if mixed := differing(results.runs):
        marks += f" Runs of different {', '.join(mixed)} stand side by side."
    return "".join(tables) + f"\n{note}{marks}\n\n"
