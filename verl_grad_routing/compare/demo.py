"""``make demo``: one small environment, trained without and with routing, compared on one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from verl_grad_routing.compare.comparison import findings, learned_to_hack
from verl_grad_routing.compare.job_numbers import reserved
from verl_grad_routing.compare.launch import launch, quoted, seed_overrides
from verl_grad_routing.compare.report import write_report
from verl_grad_routing.compare.runs import Run
from verl_grad_routing.compare.tables import cost_table, notes, rates_table, types_table
from verl_grad_routing.compare.watch import clock
from verl_grad_routing.errors import UserError

ENVIRONMENT = "loopholes"
PRESETS = ("off", "persona")
VALIDATIONS = 2  # half-way and at the end, beside the one before training


def run_demo(to: Path | str, steps: int = 50, seed: int = 0, limit_s: float = 1200.0) -> list[Run]:
    """Prepare the environment, train ``off`` and ``persona``, print the comparison, write the report.

    Writes ``environment/``, one run folder per preset, and what ``report.write_report`` does into ``to``. What is there
    already with the same settings is reused.

    Args:
        to: Folder.
        steps: Training steps of each run.
        seed: Of both runs; they see the same prompts in the same order.
        limit_s: Seconds that each run may take.

    Raises:
        UserError: A run failed; or the unrouted one did not learn to hack, so that the comparison shows nothing.
    """
    from verl_grad_routing.envs import prepare_environment

    started, to = time.monotonic(), Path(to).resolve()
    environment = to / "environment"
    with reserved() as number:
        if number > 1:
            fix = "vgr trains on this machine already, and runs at once would load each other's weights; wait for it"
            raise UserError("demo", f"Ray job {number}", fix)
        prepare_environment(ENVIRONMENT, environment)
        runs = [
            launch(
                preset,
                to / preset,
                demo_overrides(environment, steps, seed),
                limit_s,
                inputs=[environment / "manifest.json"],
                replace=True,
            )
            for preset in PRESETS
        ]
    page = write_report([run.folder for run in runs], to)
    show(runs)
    print(f"report: {page}\nmetrics: {to / 'metrics.jsonl'}\ndone in {clock(time.monotonic() - started)}")
    if not learned_to_hack(runs[0]):
        last = runs[0].rates("last", deployed=False).overall.hack
        fix = "the unrouted run did not learn to hack, so there was nothing to route away; train longer or see its log"
        raise UserError(f"{runs[0].record.preset}: hack rate as trained", str(last), fix)
    return runs


def demo_overrides(environment: Path, steps: int, seed: int) -> list[str]:
    """The overrides of both runs; the preset is all that differs between them."""
    return [
        f"+grad_routing/environment={ENVIRONMENT}",
        "+grad_routing/hardware=cpu",
        f"grad_routing.environment.dir={quoted(str(environment))}",
        f"trainer.total_training_steps={steps}",
        f"trainer.test_freq={max(1, steps // VALIDATIONS)}",
        *seed_overrides(seed),
    ]


def show(runs: Sequence[Run]) -> None:
    """Print tables, findings and notes on standard output."""
    from verl_grad_routing.compare.terminal import console, print_tables

    out = console()
    print_tables((rates_table(runs), types_table(runs), cost_table(runs)), out)
    for finding in findings(runs):
        style = None if finding.holds else "bold red"
        out.print(f"{finding.mark} {finding.text}", style=style, markup=False)
    for note in notes(runs):
        out.print(note, style="dim", markup=False)
