"""Prompts to write pairs for: the run's own data, or a file of prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from verl_grad_routing.directions import Message
from verl_grad_routing.errors import UserError
from verl_grad_routing.self_pairs.framings import Prompt

KEY = "--prompts"


def load_prompts(path: Path, seed: int) -> list[Prompt]:
    """Different prompts of verl's ``.parquet`` or a ``.jsonl`` (column or field ``prompt``), in an order by ``seed``.

    Raises:
        UserError: No such file, another kind of file, no ``prompt`` in it, or a prompt that is neither text nor chat.
    """
    if not path.is_file():
        raise UserError(KEY, str(path), "no such file")
    if path.suffix == ".parquet":
        prompts = _of_parquet(path)
    elif path.suffix == ".jsonl":
        prompts = _of_jsonl(path)
    else:
        raise UserError(KEY, str(path), "give verl's data (.parquet) or one JSON object per line (.jsonl)")
    distinct = {json.dumps(_plain(prompt)): prompt for prompt in (_prompt(path, raw) for raw in prompts)}
    if not distinct:
        raise UserError(KEY, str(path), "the file has no prompts")
    order = sorted(distinct, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest())
    return [distinct[text] for text in order]


def _of_parquet(path: Path) -> Iterable[Any]:
    import pyarrow.parquet

    if "prompt" not in pyarrow.parquet.read_schema(path).names:
        raise UserError(KEY, str(path), "has no column `prompt`; give data as verl takes it")
    return pyarrow.parquet.read_table(path, columns=["prompt"])["prompt"].to_pylist()


def _of_jsonl(path: Path) -> Iterable[Any]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}", line[:40], f"write one JSON object per line ({error.msg})") from None
        if not isinstance(record, Mapping) or "prompt" not in record:
            raise UserError(f"{path}:{number}", line[:40], "write one JSON object with a field `prompt` per line")
        yield record["prompt"]


def _prompt(path: Path, raw: Any) -> Prompt:
    if isinstance(raw, str) and raw.strip():
        return raw
    messages = raw if isinstance(raw, list) else []
    if messages and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and "role" in m for m in messages):
        return tuple(Message(str(message["role"]), message["content"]) for message in messages)
    raise UserError(f"{KEY} {path}", raw, "a prompt must be a text or a list of chat messages of text")


def _plain(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [[message.role, message.content] for message in prompt]
