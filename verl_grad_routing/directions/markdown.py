"""Reader of contrastive pairs in Markdown; the format is described in ``directions.pairs``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from verl_grad_routing.errors import UserError

FENCE = re.compile(r" {0,3}(`{3,})[^`]*")
FIELDS = {"Prompt": "prompt", "Unwanted": "unwanted", "Wanted": "wanted"}


class RawPair(NamedTuple):
    """A pair before validation, and where it stands (``file:line``)."""

    where: str
    record: dict[str, Any]


class _Line(NamedTuple):
    """A line of Markdown, or a whole fenced block (``block`` is its content)."""

    number: int
    text: str
    block: str | None = None


def read_markdown(path: str, text: str) -> dict[str, list[RawPair]]:
    """Sections of raw pairs, in file order.

    Raises:
        UserError: Naming file and line: an open fence, a section or pair without a name, a section that occurs twice,
            a pair outside a section, a section without pairs, an unknown, missing or repeated field, or stray text.
    """
    sections: dict[str, list[RawPair]] = {}
    current: list[RawPair] | None = None
    field: str | None = None
    for line in _lines(path, text):
        where, (level, title) = f"{path}:{line.number}", _heading(line)
        if field is not None and (level or line.text.strip()) and line.block is None:
            raise UserError(where, line.text, f"write the {field} as one block fenced with at least three backticks")
        pair = current[-1].record if current else None
        if level == 2:
            current = _open_section(where, title, sections)
        elif level == 3:
            _open_pair(where, title, current)
        elif level == 4:
            field = _open_field(where, title, pair)
        elif line.block is not None and pair is not None and field is not None:
            pair[field], field = line.block, None
        elif line.text.startswith("Tags:") and pair is not None and set(pair) == {"id"}:
            pair["tags"] = [tag.strip() for tag in line.text[len("Tags:") :].split(",") if tag.strip()]
        elif pair is not None and line.text.strip():
            raise UserError(where, line.text, "a pair has a Tags line and the blocks Prompt, Unwanted, Wanted, no more")
    if field is not None:
        raise UserError(path, field, "the file ends before this field's fenced block")
    _require_pairs(path, sections)
    return sections


def _lines(path: str, text: str) -> Iterator[_Line]:
    opened: tuple[int, str, str] | None = None  # line number, line, backticks of an open fence
    content: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        fence = FENCE.fullmatch(line)
        if opened is None:
            if fence is None:
                yield _Line(number, line)
            else:
                opened, content = (number, line, fence[1]), []
        elif line.strip() == "`" * max(len(opened[2]), len(line.strip())):
            yield _Line(opened[0], opened[1], "\n".join(content))
            opened = None
        else:
            content.append(line)
    if opened is not None:
        raise UserError(f"{path}:{opened[0]}", opened[1], "close this fence with as many backticks")


def _heading(line: _Line) -> tuple[int, str]:
    marks = re.match(r"(#{2,4}) +(.*)", line.text) if line.block is None else None
    return (len(marks[1]), marks[2].strip()) if marks else (0, "")


def _open_section(where: str, title: str, sections: dict[str, list[RawPair]]) -> list[RawPair]:
    if not title or title in sections:
        raise UserError(where, title, "give every section its own name")
    sections[title] = []
    return sections[title]


def _open_pair(where: str, title: str, current: list[RawPair] | None) -> None:
    if current is None:
        raise UserError(where, title, "put the pair under a section (## name)")
    current.append(RawPair(where, {"id": title}))


def _open_field(where: str, title: str, pair: dict[str, Any] | None) -> str:
    if pair is None:
        raise UserError(where, title, "put the field under a pair (### id)")
    if title not in FIELDS:
        raise UserError(where, title, f"unknown field; known: {', '.join(FIELDS)}")
    if FIELDS[title] in pair:
        raise UserError(where, title, "this pair has that field already")
    return FIELDS[title]


def _require_pairs(path: str, sections: dict[str, list[RawPair]]) -> None:
    if not sections:
        raise UserError("pairs", path, "the file has no sections (## name) of pairs (### id)")
    for title, pairs in sections.items():
        if not pairs:
            raise UserError("pairs", f"{path}#{title}", "the section has no pairs (### id)")
