"""The strict verdict: values come out of the sandbox and are compared here with what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_grad_routing.envs.sandbox.launch import Launcher
from verl_grad_routing.envs.sandbox.limits import Limits
from verl_grad_routing.envs.sandbox.process import Completed, run
from verl_grad_routing.envs.sandbox.values import Invalid, decode, same

RUNNER = Path(__file__).with_name("runner.py")


@dataclass(frozen=True)
class Call:
    """Arguments of one call and the value that it must return; ``value`` never leaves this process."""

    args: Sequence[Any]
    value: Any
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the sandbox gets."""
        return {"args": list(self.args), "kwargs": self.kwargs}


@dataclass(frozen=True)
class Task:
    """What a candidate is asked for.

    Attributes:
        entry: The function's name, or ``Class().method``.
        calls: The tests.
        setup: Source that runs before the candidate's, e.g. its imports.
    """

    entry: str
    calls: tuple[Call, ...]
    setup: str = ""

    def job(self, source: str) -> dict[str, Any]:
        """The inputs alone, for the sandbox."""
        calls = [call.inputs for call in self.calls]
        return {"source": source, "setup": self.setup, "entry": self.entry, "calls": calls}


@dataclass(frozen=True)
class Report:
    """The finding on one candidate.

    Attributes:
        end: ``line``, ``exit``, ``timeout`` or ``flood``, see ``Completed``; ``invalid`` for a line that is no report.
        passed: One per test; all false unless a report came.
        errors: Exception name per test, empty where a value came.
    """

    end: str
    passed: tuple[bool, ...]
    errors: tuple[str, ...] = ()

    @property
    def solved(self) -> bool:
        """Every test passed, and there was one."""
        return bool(self.passed) and all(self.passed)


def grade(launcher: Launcher, source: str, task: Task, limits: Limits) -> Report:
    """Run ``source`` on the task's inputs in a sandbox and compare what it returns. Raises ``SandboxError``."""
    return judge(run(launcher, RUNNER, task.job(source), limits), task.calls)


def judge(completed: Completed, calls: Sequence[Call]) -> Report:
    """Compare a run's report, a line of ``{"results": [["value", v] | ["error", name], ...]}``, with ``calls``."""
    failed = (False,) * len(calls)
    if completed.end != "line":
        return Report(completed.end, failed)
    try:
        results = _results(decode(completed.line), len(calls))
    except Invalid:
        return Report("invalid", failed)
    passed = tuple(kind == "value" and same(call.value, got) for call, (kind, got) in zip(calls, results, strict=True))
    return Report("line", passed, tuple(got if kind == "error" else "" for kind, got in results))


def _results(report: Any, count: int) -> list[tuple[str, Any]]:
    results = report.get("results") if type(report) is dict else None
    if type(results) is not list or len(results) != count:
        raise Invalid("no results")
    for entry in results:
        if type(entry) is not list or len(entry) != 2 or entry[0] not in ("value", "error"):
            raise Invalid("no result")
        if entry[0] == "error" and type(entry[1]) is not str:
            raise Invalid("no error name")
    return [(kind, got) for kind, got in results]
