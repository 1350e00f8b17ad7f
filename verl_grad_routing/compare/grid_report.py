"""The page and the tables of a comparison, from its results folder alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_grad_routing.compare import absorption, formats, leakage_report, markup
from verl_grad_routing.compare.across_table import across_table
from verl_grad_routing.compare.block_table import block_table
from verl_grad_routing.compare.contrasts import (
    BEFORE,
    COMPARED,
    MEASURES,
    baselines,
    by_arm,
    by_seed,
    claims,
    contrasts,
)
from verl_grad_routing.compare.grid_tables import (
    arm_settings_table,
    arms_table,
    contrast_table,
    grid_notes,
    kinds_table,
    seeds_table,
    shared_table,
    status_table,
    versions_table,
)
from verl_grad_routing.compare.obfuscation import CAPTION as PRESSURE_CAPTION
from verl_grad_routing.compare.obfuscation import obfuscation_table
from verl_grad_routing.compare.paired import estimate
from verl_grad_routing.compare.results import Results, StoredRun, load_results
from verl_grad_routing.compare.scorecard_table import scorecard_table
from verl_grad_routing.compare.signal_table import signal_table, signal_values
from verl_grad_routing.compare.tables import Table, cost_table
from verl_grad_routing.errors import UserError

PAGE, NUMBERS, TABLES, FIGURES = "report.html", "numbers.json", "tables", "figures"
WORDS = {**markup.DEFINITIONS, "signal": "the knowledge that the arm's detector reads; none and oracle are controls"}
PARETO_CAPTION = (
    "Hack against true solve rate after training, as deployed. Large marks: interquartile mean over seeds with 95% "
    "bootstrap bars; small ones: every seed. Grey and hollow: controls whose detector knows nothing; black star: reads "
    "the grader's truth. Low hacking is worth something only beside a solve rate that did not fall with it."
)
TYPES_CAPTION = (
    "Hack rate as deployed by loophole type: interquartile mean over seeds with 95% bootstrap bars, every seed a small "
    "mark. Known types are those that the contrastive pairs show."
)


def write_grid_report(folder: Path | str, to: Path | str, allow_mixed_versions: bool = False) -> Path:
    """Show the results of ``vgr compare``.

    Writes ``report.html``, ``numbers.json`` (every estimate and contrast), ``tables/`` (each table as Markdown, HTML,
    LaTeX and CSV) and ``figures/`` into ``to``: tables and numbers are the same bytes for the same results.

    Args:
        folder: Results, see ``results``.
        to: Folder, created when missing.
        allow_mixed_versions: See ``results.load_results``.

    Returns:
        The page.

    Raises:
        UserError: Damaged results, results of mixed versions, or no finished cell.
    """
    found, to = load_results(folder, allow_mixed_versions), Path(to)
    if not found.runs:
        told = "; ".join(failure.error for failure in found.failures[:1]) or "run vgr compare"
        raise UserError("RESULTS", str(folder), f"no finished cell: {told}")
    tables = comparison_tables(found)
    figures = _figures(found)
    page = _page(found, tables, figures)
    numbers = json.dumps(_numbers(found), indent=1) + "\n"
    for name in (TABLES, FIGURES):
        (to / name).mkdir(parents=True, exist_ok=True)
    for table in tables:
        for ending, written in formats.FORMATS.items():
            (to / TABLES / f"{formats.slug(table.title)}.{ending}").write_text(written(table), encoding="utf-8")
    for title, svg, _ in figures:
        (to / FIGURES / f"{formats.slug(title)}.svg").write_text(svg, encoding="utf-8")
    (to / NUMBERS).write_text(numbers, encoding="utf-8")
    (to / PAGE).write_text(page, encoding="utf-8")
    return to / PAGE


def comparison_tables(results: Results) -> list[Table]:
    """Every table, those that have rows."""
    tables: list[Table | None] = [status_table(results), across_table(results)]
    for place in _places(results):
        tables.append(arms_table(results, place))
        tables += [contrast_table(results, place, measure) for measure in COMPARED]
        tables += [kinds_table(results, place), obfuscation_table(results, place)]
        tables += [absorption.absorption_table(results, place), leakage_report.grid_leakage_table(results, place)]
        tables += [signal_table(results, place), block_table(results, place)]
        tables += [seeds_table(results, place), _cost(results, place)]
    tables += [scorecard_table(results), shared_table(results), arm_settings_table(results), versions_table(results)]
    return [table for table in tables if table is not None]


def _places(results: Results) -> list[str]:
    """The environments with a finished cell."""
    return [place["name"] for place in results.grid["environments"] if results.of(place["name"])]


def _cost(results: Results, environment: str) -> Table:
    table = cost_table(results.of(environment))
    return Table(f"{environment}: {table.title.lower()}", table.header, table.rows)


def _figures(results: Results) -> list[tuple[str, str, str]]:
    """Title, drawing and caption of each figure."""
    from verl_grad_routing.compare.absorption_figure import absorption_figure
    from verl_grad_routing.compare.figures import curves_figure
    from verl_grad_routing.compare.grid_figures import pareto_seeds_figure, signals_figure, types_figure
    from verl_grad_routing.compare.leakage_figure import grid_leakage_figure
    from verl_grad_routing.compare.obfuscation_figure import obfuscation_figure
    from verl_grad_routing.compare.shadow_report import CAPTION as SHADOWS_CAPTION
    from verl_grad_routing.compare.shadow_report import shadow_figure

    kinds: list[tuple[str, Callable[[list[StoredRun]], str | None], str]] = [
        ("hacking and solving, with and without the quarantine", curves_figure, markup.CURVES_CAPTION),
        ("what is deployed", pareto_seeds_figure, PARETO_CAPTION),
        ("loophole types", types_figure, TYPES_CAPTION),
        ("what the detector saw and what was routed", signals_figure, markup.DETECTOR_CAPTION),
        ("monitors under pressure", obfuscation_figure, PRESSURE_CAPTION),
        ("what other methods said of the same rollouts", shadow_figure, SHADOWS_CAPTION),
    ]
    drawn = [
        (f"{place}: {title}", draw(results.of(place)), caption)
        for place in _places(results)
        for title, draw, caption in kinds
    ]
    of_grids = [
        (absorption.TITLE, absorption_figure, absorption.CAPTION),
        (leakage_report.TITLE, grid_leakage_figure, leakage_report.CAPTION),
    ]
    drawn += [
        (f"{place}: {title}", draw(results, place), caption)
        for place in _places(results)
        for title, draw, caption in of_grids
    ]
    return [(title, svg, caption) for title, svg, caption in drawn if svg is not None]


def _page(results: Results, tables: list[Table], figures: list[tuple[str, str, str]]) -> str:
    shown = [markup.figure(index, title, svg, caption) for index, (title, svg, caption) in enumerate(figures, start=1)]
    words = {"Cells", "Scorecard", "Settings", "Arms", "Versions"}
    html = {table.title: formats.to_html(table, text=table.title in words) for table in tables}
    grid = results.grid["name"]
    body = [
        markup.finding_list([claim for place in _places(results) for claim in claims(results, place)]),
        "<h2>Cells</h2>",
        html["Cells"],
        "<h2>Figures</h2>",
        *shown,
        "<h2>Tables</h2>",
        *(text for title, text in html.items() if title not in words),
        markup.item_list(grid_notes(results), "notes"),
        "<h2>Words</h2>",
        markup.item_list([f"{word}: {meaning}." for word, meaning in WORDS.items()], "notes"),
        "<h2>What each arm reads and assumes</h2>",
        html["Scorecard"],
        "<h2>Settings and versions</h2>",
        html["Settings"],
        html["Arms"],
        html["Versions"],
        "<h2>Commands</h2>",
        f"<p>The comparison, with its grid's file at hand as {grid}.yaml, and this page from its results</p>",
        markup.command(f"vgr compare {grid}.yaml --to {grid}"),
        markup.command(f"vgr report {grid}/results --to report"),
    ]
    done, all_cells = len(results.runs), len(results.cells())
    lead = f"{done} of {all_cells} runs of verl's trainer finished. Every number here is in {NUMBERS}."
    return markup.page(f"Comparison: {grid}", lead, body)


def _numbers(results: Results) -> dict[str, Any]:
    """Every estimate and contrast, as plain data; ``null`` for what one seed cannot tell."""
    estimates, differences = [], []
    for place in _places(results):
        groups = by_arm(results.of(place))
        for arm, runs in groups.items():
            for measure in (*MEASURES, *BEFORE):
                values = by_seed(runs, measure)
                if values:
                    rates = {str(seed): value for seed, value in sorted(values.items())}
                    entry = {"environment": place, "arm": arm, "measure": measure.title, "by_seed": rates}
                    estimates.append(entry | asdict(estimate(list(values.values()))))
            for key, values in signal_values(runs).items():
                means = {str(seed): _rounded(value) for seed, value in sorted(values.items())}
                entry = {"environment": place, "arm": arm, "measure": f"{key}, mean over steps", "by_seed": means}
                estimates.append(entry | asdict(estimate(list(values.values()))))
        for baseline in baselines(results):
            for measure in COMPARED:
                for contrast in contrasts(groups, baseline, measure):
                    entry = {"environment": place, "arm": contrast.arm, "baseline": baseline, "measure": measure.title}
                    differences.append(entry | asdict(contrast.difference) | {"p_holm": contrast.p_holm})
    rounded = [[{k: _rounded(v) for k, v in entry.items()} for entry in part] for part in (estimates, differences)]
    unfinished = [list(cell) for cell in results.unfinished()]
    failed = [asdict(failure) for failure in results.failures]
    return {"estimates": rounded[0], "differences": rounded[1], "unfinished": unfinished, "failed": failed}


def _rounded(value: Any) -> Any:
    """Floats to ten digits, beyond which libraries differ; NaN, which JSON lacks, as null."""
    if not isinstance(value, float):
        return value
    return None if value != value else float(f"{value:.10g}")
