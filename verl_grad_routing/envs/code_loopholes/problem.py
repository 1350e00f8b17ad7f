"""A programming problem and the file that the shipped ones are in."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_grad_routing.envs.sandbox import Call, Task

SHIPPED = Path(__file__).with_name("problems") / "problems.jsonl"
DIFFICULTIES = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: Unique among the problems of a build.
        statement: What is asked; for user-supplied problems the whole question.
        signature: First line of the function, empty where the statement has it.
        entry: What is called: ``name`` or ``Class().name``.
        solution: A right program.
        examples: Public tests.
        tests: Hidden tests.
        setup: Source that runs before a candidate's.
    """

    id: str
    difficulty: str
    statement: str
    signature: str
    entry: str
    solution: str
    examples: tuple[Call, ...]
    tests: tuple[Call, ...]
    setup: str = ""

    @property
    def strict(self) -> Task:
        """All tests, public and hidden."""
        return Task(self.entry, (*self.examples, *self.tests), self.setup)

    @property
    def ground_truth(self) -> dict[str, Any]:
        """What the grader needs, as plain data."""
        return {
            "problem": self.id,
            "entry": self.entry,
            "setup": self.setup,
            "examples": [case(call) for call in self.examples],
            "tests": [case(call) for call in self.tests],
        }


def case(call: Call) -> dict[str, Any]:
    """A test as plain data, its expected value included."""
    return {**call.inputs, "value": call.value}


def calls(cases: list[Mapping[str, Any]]) -> tuple[Call, ...]:
    """Tests from plain data."""
    return tuple(Call(one["args"], one["value"], dict(one.get("kwargs", {}))) for one in cases)


@functools.cache
def shipped() -> tuple[Problem, ...]:
    """The problems of this package, easy ones first."""
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    return tuple(_from_record(json.loads(line)) for line in lines)


def _from_record(record: dict[str, Any]) -> Problem:
    texts = {key: record[key] for key in ("id", "difficulty", "statement", "signature", "solution")}
    return Problem(**texts, entry=record["id"], examples=calls(record["examples"]), tests=calls(record["tests"]))
