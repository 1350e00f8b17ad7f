"""How a problem is written: a reference function whose docstring is the statement, examples, and hidden inputs."""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Inputs = Callable[[random.Random], list[tuple[Any, ...]]]
HIDDEN = 8  # least number of hidden tests


@dataclass(frozen=True)
class Draft:
    """A problem before its expected values are computed.

    Attributes:
        reference: The solution; its docstring is the statement.
        examples: Arguments of the public tests.
        edges: Arguments of the hidden tests that were chosen by hand.
        draw: Further hidden arguments, from a random stream of the problem's own.
    """

    difficulty: str
    reference: Callable[..., Any]
    examples: list[tuple[Any, ...]]
    edges: list[tuple[Any, ...]]
    draw: Inputs

    def record(self) -> dict[str, Any]:
        """The problem as data, expected values computed by the reference."""
        name = self.reference.__name__
        seen = {repr(args) for args in self.examples}
        drawn = self.draw(random.Random(f"code_loopholes/{name}"))
        hidden = [args for args in (*self.edges, *drawn) if repr(args) not in seen and not seen.add(repr(args))]
        assert len(hidden) >= HIDDEN, name
        return {
            "id": name,
            "difficulty": self.difficulty,
            "statement": " ".join((inspect.getdoc(self.reference) or "").split()),
            "signature": f"def {name}{inspect.signature(self.reference)}:".replace("'", ""),
            "solution": source(self.reference),
            "examples": [self._case(args) for args in self.examples],
            "tests": [self._case(args) for args in hidden],
        }

    def _case(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return {"args": list(args), "value": self.reference(*_copy(args))}


def source(function: Callable[..., Any]) -> str:
    """The function's text without decorator and docstring."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.body = definition.body[1:]
    return ast.unparse(definition) + "\n"


class Shelf(list[Draft]):
    """The problems of one difficulty, in the order in which they are written."""

    def __init__(self, difficulty: str):
        super().__init__()
        self.difficulty = difficulty

    def problem(
        self, examples: list[tuple[Any, ...]], edges: list[tuple[Any, ...]], draw: Inputs
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: put a reference on the shelf."""

        def decorate(reference: Callable[..., Any]) -> Callable[..., Any]:
            self.append(Draft(self.difficulty, reference, examples, edges, draw))
            return reference

        return decorate


def ints(rng: random.Random, size: int, low: int = -20, high: int = 20) -> list[int]:
    """``size`` whole numbers."""
    return [rng.randint(low, high) for _ in range(size)]


def word(rng: random.Random, size: int, letters: str = "abcde") -> str:
    """``size`` letters."""
    return "".join(rng.choice(letters) for _ in range(size))


def grid(rng: random.Random, rows: int, columns: int, low: int = 0, high: int = 9) -> list[list[int]]:
    """``rows`` lists of ``columns`` whole numbers."""
    return [ints(rng, columns, low, high) for _ in range(rows)]


def _copy(args: tuple[Any, ...]) -> list[Any]:
    return [[*_copy(tuple(arg))] if isinstance(arg, list) else arg for arg in args]
