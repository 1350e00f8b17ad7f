"""``vgr leakage``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from verl_grad_routing.errors import UserError


def leakage(
    source: Annotated[
        Path, typer.Argument(help="Results folder of vgr compare; or CSV or JSON: name, role, exposure, value, seed.")
    ],
    baseline: Annotated[
        list[str] | None, typer.Option(help="Arm of the baseline curve; those named exposure_<number> if none.")
    ] = None,
    environment: Annotated[str | None, typer.Option(help="Which one, of a grid with several.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
    allow_mixed_versions: Annotated[
        bool, typer.Option("--allow-mixed-versions", help="Accept results of different package versions.")
    ] = False,
) -> None:
    """How much undesired data that nobody labelled reached what is deployed; 1 is what filtering leaks (SGTM)."""
    from verl_grad_routing.compare.leakage import leaks
    from verl_grad_routing.compare.leakage_read import arms_of_file, arms_of_results
    from verl_grad_routing.compare.leakage_report import leakage_table, notes
    from verl_grad_routing.compare.results import is_results, load_results
    from verl_grad_routing.compare.terminal import console, print_tables

    if is_results(source):
        results = load_results(source, allow_mixed_versions)
        place = _place([entry["name"] for entry in results.grid["environments"]], environment)
        baselines, arms = arms_of_results(results, place, baseline or ())
    elif baseline or environment:
        raise UserError("SOURCE", str(source), "no results folder: --baseline and --environment are for one")
    else:
        place = source.name
        baselines, arms = arms_of_file(source)
    curve, found = leaks(baselines, arms)
    print_tables([leakage_table(f"{place}: leakage (arXiv 2512.05648)", curve, found)], console())
    for note in notes(curve):
        print(note)
    if json is not None:
        points = [{"exposure": e, "value": v} for e, v in zip(curve.exposures, curve.values, strict=True)]
        data = {"baseline": points, "turns_back": curve.turns_back, "runs": [leak.as_dict() for leak in found]}
        json.write_text(json_module.dumps(data, indent=2) + "\n", encoding="utf-8")


def _place(names: list[str], wanted: str | None) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise UserError("--environment", wanted, f"give one of {', '.join(names)}")
    return wanted
