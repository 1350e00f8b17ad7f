"""Problems of the user's own, one JSON object per line, in the format of the public ``rl-rewardhacking`` data.

Read are these fields; others (``dataset``, ``evaluator``, ``prompt``, ``answer``, ``hint``, ...) are ignored:

    id                  number or text, unique in the file
    question            text: the problem, with its starter code
    gt_answer           list of texts, at least two: ``assert <call> == <value>``; arguments and value are literals
    func_name           what the assertions call: ``Solution().name``, ``Solution.name`` or ``name``
    canonical_solution  text: a right program
    setup_code          text, optional: runs before the program, e.g. its imports
    difficulty          text, optional: ``medium`` if left out

The first two assertions are the public examples.
"""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

from verl_grad_routing.envs.code_loopholes.problem import Problem
from verl_grad_routing.envs.sandbox import Call
from verl_grad_routing.errors import UserError

EXAMPLES = 2
TEXTS = ("question", "func_name", "canonical_solution")


def read(path: str | Path) -> tuple[Problem, ...]:
    """Read a problem file.

    Raises:
        UserError: No such file, or a bad line: names line number and field.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError("problems", str(path), "no such file; give a JSONL file (fields: docs/environments.md)")
    found: dict[str, Problem] = {}
    asked: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError("problems", str(path), f"save the file as UTF-8 (byte {error.start} is not)") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            problem = _problem(where, line)
            if problem.id in found:
                raise UserError(f"{where} id", problem.id, "this id is taken; give every problem its own")
            if problem.statement in asked:
                fix = f"line {asked[problem.statement]} asks the same; give each question once: splits share none"
                raise UserError(f"{where} question", problem.statement[:40], fix)
            asked[problem.statement], found[problem.id] = number, problem
    if not found:
        raise UserError("problems", str(path), "the file is empty")
    return tuple(found.values())


def _problem(where: str, line: str) -> Problem:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(where, line[:40], "write one JSON object per line")
    for field in ("id", *TEXTS, "gt_answer"):
        if field not in record:
            raise UserError(f"{where} {field}", None, "this field is missing")
    if type(record["id"]) not in (int, str) or record["id"] == "":
        raise UserError(f"{where} id", record["id"], "give a number or a text")
    for field in (*TEXTS, "setup_code", "difficulty"):
        if not isinstance(record.get(field, ""), str) or (field in TEXTS and not record[field].strip()):
            raise UserError(f"{where} {field}", record[field], "give a text that is not empty")
    entry = _entry(where, record["func_name"])
    asserts = record["gt_answer"]
    if not isinstance(asserts, list) or len(asserts) <= EXAMPLES or not all(isinstance(a, str) for a in asserts):
        raise UserError(f"{where} gt_answer", str(asserts)[:40], f"give a list of at least {EXAMPLES + 1} assertions")
    cases = tuple(_call(f"{where} gt_answer[{index}]", text, entry) for index, text in enumerate(asserts))
    return Problem(
        id=str(record["id"]),
        difficulty=record.get("difficulty", "medium"),
        statement=record["question"].strip(),
        signature="",
        entry=entry,
        solution=record["canonical_solution"],
        examples=cases[:EXAMPLES],
        tests=cases[EXAMPLES:],
        setup=record.get("setup_code", ""),
    )


def _entry(where: str, name: str) -> str:
    parts = name.replace("()", "").split(".")
    if len(parts) > 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"{where} func_name", name, "write Solution().name, Solution.name or name")
    return "().".join(parts)


def _call(where: str, text: str, entry: str) -> Call:
    """``assert entry(literals) == literal`` as inputs and expected value."""
    try:
        (statement,) = ast.parse(text.strip()).body
        assert isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)
        left, (operator,), (right,) = statement.test.left, statement.test.ops, statement.test.comparators
        assert isinstance(left, ast.Call) and isinstance(operator, ast.Eq) and ast.unparse(left.func) == entry
        args = [_plain(argument) for argument in left.args]
        kwargs = {keyword.arg: _plain(keyword.value) for keyword in left.keywords if keyword.arg}
        assert len(kwargs) == len(left.keywords)
        return Call(args, _plain(right), kwargs)
    except (AssertionError, ValueError, TypeError, SyntaxError, RecursionError):
        fix = f"write assert {entry}(...) == ..., with literals of None, bool, numbers, text, lists, dicts of text"
        raise UserError(where, text[:60], fix) from None


def _plain(node: ast.expr) -> Any:
    value = ast.literal_eval(node)
    _check(value)
    return value


def _check(value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _check(item)
    elif isinstance(value, dict):
        assert all(type(key) is str for key in value)
        _check(list(value.values()))
    else:
        assert value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
