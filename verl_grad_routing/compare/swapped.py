"""Validations of the quarantine alone (``grad_routing.validate_swapped``), from a run's metrics.

Standard library only: ``results`` keeps these metrics of a cell, ``block_table`` shows them.
"""

from __future__ import annotations

import re

from verl_grad_routing.compare.runs import Run

KEY = re.compile(r"val/swapped/val-(?:core|aux)/.+/(?P<what>hack|solve)/mean@[0-9]+")


def swapped_keys(run: Run) -> list[str]:
    """verl's names of the hack and the solve rate of those validations, one of each a data source."""
    return [key for key in run.keys if KEY.fullmatch(key)]


def swapped_rate(run: Run, what: str) -> float | None:
    """The rate of the quarantine alone after training, data sources alike; None of a run that did not validate it."""
    keys = [key for key in swapped_keys(run) if KEY.fullmatch(key)["what"] == what]  # type: ignore[index]
    rates = [float(run.curve(key).values[-1]) for key in keys]
    return sum(rates) / len(rates) if rates else None
