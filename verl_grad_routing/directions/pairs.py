"""Contrastive pairs: the same prompt answered once in the unwanted way and once in the wanted way.

Two file formats, told apart by their ending.

**JSONL** (``name.jsonl``): one object per line; blank lines are skipped; ``tags`` may be left out::

    {"id": "tidy-desk", "prompt": "Is the desk tidy?", "unwanted": "Yes!", "wanted": "No, two cups.", "tags": ["home"]}

``prompt`` is a string, tokenised as it stands, or a list of chat messages ``{"role": ..., "content": ...}``, rendered
with the model's chat template.

**Markdown** (``name.md``): prose, then sections of pairs. Each of the three fields is one block fenced with three or
more backticks (more than any run of backticks in the text); ``Tags:`` may be left out; prompts are strings::

    ## honesty
    ### tidy-desk
    Tags: home, short
    #### Prompt
    ```
    Is the desk tidy?
    ```
    #### Unwanted
    ```
    Yes!
    ```
    #### Wanted
    ```
    No, two cups.
    ```

A *selector* names a file and what to take from it: ``path.jsonl[@tag,tag]`` or ``path.md#section[@tag,tag]``. With
tags, the pairs that carry at least one of them are taken. A file with a single section needs no ``#section``. A file
inside an installed package is ``pkg://package.subpackage/name.jsonl``; ``directions.concepts`` ships three such files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from verl_grad_routing.directions.markdown import RawPair, read_markdown
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest

SELECTOR = re.compile(r"(?P<path>.+?\.(?P<kind>md|jsonl))(?:#(?P<section>[^@]+))?(?:@(?P<tags>.+))?")
FIELDS = ("id", "prompt", "unwanted", "wanted")
MIN_PAIRS = 2
PACKAGED = "pkg://"
GIVE = "give path.jsonl[@tag,tag] or path.md#section[@tag,tag]"
# As an override: Hydra's lexer refuses a bare #, and a bare comma starts a sweep.
GIVE_OVERRIDE = f"{GIVE}, in quotes within the shell's: \"grad_routing.detector.pairs='pairs.md#section'\""


@dataclass(frozen=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """One prompt with an unwanted and a wanted answer. ``prompt`` is plain text or a chat."""

    id: str
    prompt: str | tuple[Message, ...]
    unwanted: str
    wanted: str
    tags: tuple[str, ...] = ()

    @property
    def chat(self) -> list[dict[str, str]] | None:
        """The prompt as chat-template messages, or ``None`` when it is plain text."""
        if isinstance(self.prompt, str):
            return None
        return [{"role": message.role, "content": message.content} for message in self.prompt]


@dataclass(frozen=True)
class PairSet:
    """Selected pairs in file order, at least two.

    Attributes:
        pairs: The pairs.
        content_hash: SHA-256 (hex) over ids, prompts and answers of the selected pairs in order. Tags, file format,
            and everything that was not selected leave it unchanged.
        source: The selector that they were loaded with.
    """

    pairs: tuple[Pair, ...]
    content_hash: str
    source: str

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


def load_pairs(selector: str) -> PairSet:
    """Load the pairs that ``selector`` names.

    Raises:
        UserError: The selector cannot be read; the file is missing, empty or malformed (names the line); a field is
            missing, unknown or empty; both sides of a pair are equal; an id occurs twice in what is read; the section
            or tag does not exist; fewer than two pairs are selected.
    """
    match = SELECTOR.fullmatch(selector) if isinstance(selector, str) else None
    if match is None:
        raise UserError("pairs", selector, GIVE)
    path, section = _path(selector, match["path"]), match["section"]
    if not path.is_file():
        raise UserError("pairs", selector, f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("pairs", selector, f"save the file as UTF-8 (byte {error.start} is not)") from None
    if match["kind"] == "jsonl":
        if section is not None:
            raise UserError("pairs", selector, "a .jsonl file has no sections: select by @tag")
        raw = _read_jsonl(path, text)
    else:
        raw = _section(selector, section, read_markdown(str(path), text))
    pairs = _select(selector, _checked(raw), match["tags"])
    if len(pairs) < MIN_PAIRS:
        raise UserError("pairs", selector, f"{len(pairs)} pair(s) selected; a direction needs at least {MIN_PAIRS}")
    return PairSet(tuple(pairs), content_hash(pairs), selector)


def _path(selector: str, written: str) -> Path:
    """Where a selector's file is: as written, or in the package that ``pkg://package/name.jsonl`` names."""
    if not written.startswith(PACKAGED):
        return Path(written).expanduser()
    package, _, name = written.removeprefix(PACKAGED).partition("/")
    try:
        return Path(str(resources.files(package))) / name
    except (ModuleNotFoundError, ValueError, TypeError):
        fix = f"no package {package!r} is installed; write pkg://package.subpackage/name.jsonl"
        raise UserError("pairs", selector, fix) from None


def save_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """Write pairs as ``.jsonl``, whole or not at all; read again they have the same content hash."""
    records = [
        {
            "id": pair.id,
            "prompt": pair.chat or pair.prompt,
            "unwanted": pair.unwanted,
            "wanted": pair.wanted,
            "tags": list(pair.tags),
        }
        for pair in pairs
    ]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, path)


def content_hash(pairs: list[Pair] | tuple[Pair, ...]) -> str:
    """SHA-256 (hex) of ids, prompts and answers, in order, as canonical JSON."""
    content = [[pair.id, pair.chat or pair.prompt, pair.unwanted, pair.wanted] for pair in pairs]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def require_hash(pairs: PairSet, expected: str) -> None:
    """Refuse pairs that are not those a run was started with. Raises ``UserError`` naming both hashes, shortened."""
    require_same_hash(pairs.source, pairs.content_hash, expected)


def require_same_hash(source: str, found: str | None, expected: str | None) -> None:
    """As ``require_hash``, for hashes without their pairs (``None``: no pairs at all)."""
    if found != expected:
        fix = f"the run was started with pairs of hash {_short(expected)}; restore them or start a new run"
        raise UserError(f"pairs {source} (content hash)", _short(found), fix)


def rows_with_tag(pairs: PairSet, tag: str) -> tuple[int, ...]:
    """Row numbers of the pairs that carry ``tag``, ascending."""
    return tuple(row for row, pair in enumerate(pairs) if tag in pair.tags)


def split_held_out(pairs: int, fraction: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split pair indices into (fitted, held out), both in ascending order and neither empty.

    Args:
        pairs: Number of pairs, at least 2.
        fraction: Share to hold out; rounded to whole pairs, at least one and at most all but one.
        seed: Another seed, another split. The split depends on these three alone, on every platform.
    """
    if pairs < MIN_PAIRS:
        raise UserError("pairs", pairs, f"at least {MIN_PAIRS} pairs are needed to hold one out")
    if not 0 < fraction < 1:
        raise UserError("fraction", fraction, "give a share between 0 and 1")
    count = min(max(round(fraction * pairs), 1), pairs - 1)
    order = sorted(range(pairs), key=lambda index: hashlib.sha256(f"{seed}/{index}".encode()).digest())
    return tuple(sorted(order[count:])), tuple(sorted(order[:count]))


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def _read_jsonl(path: Path, text: str) -> list[RawPair]:
    raw = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                where, line[:40], f"write one JSON object per line ({error.msg} at column {error.colno})"
            ) from None
        if not isinstance(record, dict):
            raise UserError(where, line[:40], "write one JSON object per line")
        raw.append(RawPair(where, record))
    if not raw:
        raise UserError("pairs", str(path), "the file is empty")
    return raw


def _section(selector: str, section: str | None, sections: dict[str, list[RawPair]]) -> list[RawPair]:
    if section is None and len(sections) == 1:
        return next(iter(sections.values()))
    if section is None:
        raise UserError("pairs", selector, f"name a section, path.md#section: {', '.join(sections)}")
    if section not in sections:
        raise UserError("pairs", selector, f"no such section; {nearest(section, list(sections))}")
    return sections[section]


def _checked(raw: list[RawPair]) -> list[Pair]:
    pairs: list[Pair] = []
    seen: dict[str, str] = {}
    for where, record in raw:
        pair = _pair(where, record)
        if pair.id in seen:
            raise UserError(f"{where} id", pair.id, f"this id is taken by {seen[pair.id]}; give every pair its own")
        seen[pair.id] = where
        pairs.append(pair)
    return pairs


def _pair(where: str, record: dict[str, Any]) -> Pair:
    for field in FIELDS:
        if field not in record:
            raise UserError(where, field, "this field is missing")
    for field in record:
        if field not in (*FIELDS, "tags"):
            raise UserError(where, field, f"unknown field; {nearest(field, [*FIELDS, 'tags'])}")
    for field in ("id", "unwanted", "wanted"):
        if not isinstance(record[field], str) or not record[field].strip():
            raise UserError(f"{where} {field}", record[field], "give a text that is not empty")
    if record["unwanted"] == record["wanted"]:
        raise UserError(f"{where} wanted", record["wanted"][:40], "the two sides are equal; make them differ")
    tags = record.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise UserError(f"{where} tags", tags, "give a list of texts")
    return Pair(record["id"], _prompt(where, record["prompt"]), record["unwanted"], record["wanted"], tuple(tags))


def _prompt(where: str, prompt: Any) -> str | tuple[Message, ...]:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise UserError(f"{where} prompt", prompt, "give a text, or a list of chat messages, that is not empty")
    for message in prompt:
        fields = set(message) if isinstance(message, dict) else None
        if fields != {"role", "content"} or not all(isinstance(text, str) and text for text in message.values()):
            raise UserError(f"{where} prompt", message, 'write each chat message as {"role": "...", "content": "..."}')
    return tuple(Message(message["role"], message["content"]) for message in prompt)


def _select(selector: str, pairs: list[Pair], tags: str | None) -> list[Pair]:
    if tags is None:
        return pairs
    wanted = [tag.strip() for tag in tags.split(",")]
    known = sorted({tag for pair in pairs for tag in pair.tags})
    for tag in wanted:
        if tag not in known:
            raise UserError("pairs", selector, f"no pair has the tag {tag!r}; {nearest(tag, known)}")
    return [pair for pair in pairs if set(wanted) & set(pair.tags)]
