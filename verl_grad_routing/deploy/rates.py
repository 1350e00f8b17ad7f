"""Hack and solve rates of a checkpoint's step, from the validation rollouts that its run wrote.

verl writes them when ``trainer.validation_data_dir`` is set; the routed trainer writes those of the deployed model
into the folder ``deployed`` there. The numbers are the grader's, per rollout: ``hack``, ``solve`` and, where the
environment tells known loopholes from unknown ones, ``known``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from verl_grad_routing.errors import UserError


@dataclass(frozen=True)
class Rate:
    """A share of rollouts with its 95 % Wilson score interval.

    Attributes:
        hits, rollouts: Numerator and denominator.
        low, high: The interval.
    """

    hits: int
    rollouts: int
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, rollouts: int) -> Rate:
        """The rate ``hits / rollouts``, ``rollouts`` at least 1."""
        interval = binomtest(hits, rollouts).proportion_ci(0.95, method="wilson")
        return cls(hits, rollouts, float(interval.low), float(interval.high))

    def __str__(self) -> str:
        return f"{self.hits / self.rollouts:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.rollouts})"


def read_rates(run: Path, step: int | None, ablated: bool) -> dict[str, dict[str, Rate]]:
    """Rates ``as trained`` and, where the quarantine was ablated for validation, ``as deployed``.

    Args:
        run: Folder of the run; its validation rollouts are ``val/STEP.jsonl`` and ``val/deployed/STEP.jsonl``.
        step: The checkpoint's step.
        ablated: The run validates an ablated model too.

    Returns:
        ``{'as trained': {'hack': Rate, 'solve': Rate, ...}, 'as deployed': {...}}``.

    Raises:
        UserError: There are no rollouts of that step, or they carry no grader facts.
    """
    folders = {"as trained": run / "val"}
    if ablated:
        folders["as deployed"] = run / "val" / "deployed"
    return {name: _rates(folder, step) for name, folder in folders.items()}


def _rates(folder: Path, step: int | None) -> dict[str, Rate]:
    path = folder / f"{step}.jsonl"
    if not path.is_file():
        steps = sorted(int(file.stem) for file in folder.glob("*.jsonl") if file.stem.isdecimal())
        there = f"steps there: {steps}" if steps else "none there; set trainer.validation_data_dir=RUN/val"
        raise UserError("run", str(path), f"no validation rollouts of the checkpoint's step ({there})")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or not all("hack" in row and "solve" in row for row in rows):
        raise UserError("run", str(path), "its rollouts need the numbers hack and solve from the reward function")
    rates = {name: _rate(rows, name) for name in ("hack", "solve")}
    if all("known" in row for row in rows):
        for name, known in (("hack, known loopholes", True), ("hack, unknown loopholes", False)):
            some = [row for row in rows if bool(row["known"]) == known]
            if some:
                rates[name] = _rate(some, "hack")
    return rates


def _rate(rows: Sequence[Mapping[str, Any]], name: str) -> Rate:
    return Rate.of(sum(float(row[name]) > 0 for row in rows), len(rows))
