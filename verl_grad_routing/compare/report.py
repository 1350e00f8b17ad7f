"""One page about one or more runs: findings, figures, tables, settings, commands. Self-contained, and prints well."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from verl_grad_routing.compare.comparison import findings, labels, results
from verl_grad_routing.compare.figures import curves_figure, detector_figure, pareto_figure
from verl_grad_routing.compare.formats import slug, to_html
from verl_grad_routing.compare.grid_report import FIGURES, write_grid_report
from verl_grad_routing.compare.markup import (
    CURVES_CAPTION,
    DEFINITIONS,
    DETECTOR_CAPTION,
    command,
    figure,
    finding_list,
    item_list,
    page,
)
from verl_grad_routing.compare.results import is_results
from verl_grad_routing.compare.runs import METRICS, Run, load_run
from verl_grad_routing.compare.shadow_report import CAPTION as SHADOWS_CAPTION
from verl_grad_routing.compare.shadow_report import shadow_figure, shadow_table
from verl_grad_routing.compare.tables import NONE, Table, cost_table, notes, rates_table, types_table
from verl_grad_routing.errors import UserError

PAGE, RESULTS = "report.html", "results.json"
PARETO_CAPTION = (
    "Hack against true solve rate after training, 95% Wilson bars. Filled: as deployed. Hollow: the same run as "
    "trained. Low hacking is worth something only beside a solve rate that did not fall with it."
)


def write_report(runs: Sequence[Path | str], to: Path | str, allow_mixed_versions: bool = False) -> Path:
    """Compare run folders on one page; or show the comparison whose results folder is given.

    Writes ``report.html`` (figures inlined), ``figures/`` (each as SVG), ``results.json`` (every count and interval,
    settings and versions) and ``metrics.jsonl`` (all runs' metrics, each line with its run's name) into ``to``. What it
    writes of a results folder is said at ``grid_report.write_grid_report``.

    Args:
        runs: Run folders, in the order in which they are to appear; or one results folder of ``vgr compare``.
        to: Folder, created when missing.
        allow_mixed_versions: See ``results.load_results``.

    Returns:
        The page.

    Raises:
        UserError: No runs, or one without metrics or validation samples; results that do not go together.
    """
    if any(is_results(folder) for folder in runs):
        if len(runs) > 1:
            raise UserError("runs", str(runs[1]), "a results folder of vgr compare is shown alone; give only that one")
        return write_grid_report(runs[0], to, allow_mixed_versions)
    loaded, to = [load_run(folder) for folder in runs], Path(to)
    names = labels(loaded)
    numbers = json.dumps(results(loaded), indent=2) + "\n"
    drawn = _figures(loaded)
    text = _page(loaded, drawn)
    (to / FIGURES).mkdir(parents=True, exist_ok=True)
    for title, svg, _ in drawn:
        (to / FIGURES / f"{slug(title)}.svg").write_text(svg, encoding="utf-8")
    (to / RESULTS).write_text(numbers, encoding="utf-8")
    with (to / METRICS).open("w", encoding="utf-8") as file:
        for name, run in zip(names, loaded, strict=True):
            for step, data in run.rows.items():
                file.write(json.dumps({"run": name, "step": step, "data": data}) + "\n")
    (to / PAGE).write_text(text, encoding="utf-8")
    return to / PAGE


def _figures(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Title, drawing and caption of each."""
    figures = [
        ("Hacking and solving, with and without the quarantine", curves_figure(runs), CURVES_CAPTION),
        ("What is deployed", pareto_figure(runs), PARETO_CAPTION),
        ("What the detector saw and what was routed", detector_figure(runs), DETECTOR_CAPTION),
        ("What other methods said of the same rollouts", shadow_figure(runs), SHADOWS_CAPTION),
    ]
    return [(title, svg, caption) for title, svg, caption in figures if svg is not None]


def _page(runs: Sequence[Run], drawn: Sequence[tuple[str, str, str]]) -> str:
    first, second, *rest = [
        figure(index, title, svg, caption) for index, (title, svg, caption) in enumerate(drawn, start=1)
    ]
    types, shadows = types_table(runs), shadow_table(runs)
    body = [
        finding_list(findings(runs)),
        first,
        "<h2>Rates</h2>",
        to_html(rates_table(runs)),
        to_html(types) if types else "",
        item_list(notes(runs), "notes"),
        second,
        *rest,
        to_html(shadows) if shadows else "",
        "<h2>Words</h2>",
        item_list([f"{word}: {meaning}." for word, meaning in DEFINITIONS.items()], "notes"),
        "<h2>Cost</h2>",
        to_html(cost_table(runs)),
        '<p class="notes">Unshared memory counts what each process has for itself; summed memory counts pages that '
        "processes share once in each.</p>",
        "<h2>Settings and versions</h2>",
        to_html(_settings(runs), text=True),
        "<h2>Commands</h2>",
        *_commands(runs),
    ]
    title = "Gradient routing: " + ", ".join(dict.fromkeys(run.record.preset for run in runs))
    lead = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of verl's trainer. Every number here is in {RESULTS}."
    return page(title, lead, body)


def _settings(runs: Sequence[Run]) -> Table:
    records = [run.record for run in runs]
    rows = {
        "preset": [record.preset for record in records],
        "detector": [record.detector for record in records],
        "seed": [record.seed for record in records],
        "settings hash": [record.settings_hash or None for record in records],
        "code revision": [record.revision for record in records],
        "system": [(record.machine or {}).get("system") for record in records],
        "processors": [(record.machine or {}).get("cpus") for record in records],
    }
    packages = dict.fromkeys(name for record in records for name in record.versions or {})
    rows |= {package: [(record.versions or {}).get(package) for record in records] for package in packages}
    cells = [[name, *(NONE if value is None else str(value) for value in values)] for name, values in rows.items()]
    return Table("", ["", *labels(runs)], cells)


def _commands(runs: Sequence[Run]) -> list[str]:
    parts = []
    for run, label in zip(runs, labels(runs), strict=True):
        started = shlex.join(run.record.command) if run.record.command else "not recorded: started by another launcher"
        parts.append(f"<p>{escape(label)}</p>{command(started)}")
    again = shlex.join(["vgr", "report", *(run.name for run in runs), "--to", "DIR"])
    return [*parts, f"<p>This page, from the folder that holds the runs</p>{command(again)}"]
