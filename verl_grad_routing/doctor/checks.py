"""What one check of ``vgr doctor`` says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from verl_grad_routing.errors import UserError


class Status(str, Enum):
    """OK; WARN: a run may work, and this is where to look if it does not; FAIL: a run cannot work."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was checked.
        status: The verdict.
        found: What was found there.
        fix: What to do about it, as an instruction; empty when the verdict is OK.
    """

    name: str
    status: Status
    found: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f": {self.fix}" if self.fix else ""
        return f"{self.status.value:<4}  {self.name}: {self.found}{fix}"


def require(checks: Iterable[Check]) -> None:
    """Raise ``UserError`` for the first check that failed; for callers that want to stop before Ray starts."""
    for check in checks:
        if check.status is Status.FAIL:
            raise UserError(check.name, check.found, check.fix)
