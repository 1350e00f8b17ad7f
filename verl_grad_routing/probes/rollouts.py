"""Labelled rollouts: batches that a run recorded (``grad_routing.record_dir``), or a parquet file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verl_grad_routing.errors import UserError

BATCHES = "batch_*.pt"


@dataclass(frozen=True)
class Rollout:
    """Token ids of a prompt and its response, which response tokens the policy wrote, and whether it is unwanted."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    mask: tuple[int, ...]
    unwanted: bool


def data_hash(rollouts: Sequence[Rollout]) -> str:
    """SHA-256 (hex) of tokens and labels, in order."""
    rows = [[row.prompt, row.response, row.mask, row.unwanted] for row in rollouts]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode("ascii")).hexdigest()


def load_rollouts(path: Path, label: str, tokenizer: Any) -> list[Rollout]:
    """Read labelled rollouts.

    Args:
        path: A folder of recorded batches, or a parquet file with the columns ``prompt`` (text, or chat messages),
            ``response`` and ``label``.
        label: The grader's fact in recorded batches (``hack``), or the parquet column; non-zero is unwanted.
        tokenizer: Of the model; recorded batches hold tokens already.

    Raises:
        UserError: Nothing to read, a label that is missing, or only one kind of rollouts.
    """
    found = read_rollouts(path, label, tokenizer)
    kinds = {row.unwanted for row in found}
    if len(kinds) < 2:
        what = "none" if not found else f"{len(found)}, all {'unwanted' if kinds == {True} else 'clean'}"
        raise UserError("ROLLOUTS", str(path), f"a probe needs rollouts of both kinds; found {what}")
    return found


def read_rollouts(path: Path, label: str, tokenizer: Any, option: str = "ROLLOUTS") -> list[Rollout]:
    """As ``load_rollouts``, of whatever kinds there are; ``option`` names the path in errors."""
    if path.is_dir():
        return list(_recorded(path, label, option))
    if path.is_file():
        return list(_parquet(path, label, tokenizer, option))
    raise UserError(option, str(path), "no such file or folder; record one with grad_routing.record_dir")


def _recorded(folder: Path, label: str, option: str) -> Iterator[Rollout]:
    files = sorted(folder.glob(BATCHES))
    if not files:
        raise UserError(option, str(folder), f"no {BATCHES} there; record some with grad_routing.record_dir")
    for file in files:
        saved = torch.load(file, weights_only=False)
        fields = saved["fields"]
        columns = [fields[name].unbind() for name in ("prompts", "responses", "response_mask")]
        extra = fields["extra_fields"]
        facts = extra.tolist() if hasattr(extra, "tolist") else list(extra)
        for prompt, response, mask, known, tag in zip(*columns, facts, saved["tags"], strict=True):
            if tag.get("is_padding", False):
                continue
            graded = (known or {}).get("reward_extra_info") or {}
            if label not in graded:
                raise UserError("--label", label, f"{file.name} has the grader's facts {sorted(graded)}")
            ids = (tuple(column.tolist()) for column in (prompt, response, mask))
            yield Rollout(next(ids), next(ids), next(ids), float(graded[label]) > 0)


def _parquet(path: Path, label: str, tokenizer: Any, option: str) -> Iterator[Rollout]:
    import pandas

    table = pandas.read_parquet(path)
    for column in ("prompt", "response", label):
        if column not in table:
            raise UserError(option, str(path), f"no column {column!r}; it has {', '.join(map(str, table.columns))}")
    for prompt, response, unwanted in zip(table["prompt"], table["response"], table[label], strict=True):
        ids = prompt_tokens(prompt, tokenizer)
        answer = tokenizer(response, add_special_tokens=False)["input_ids"]
        if not answer or answer[-1] != tokenizer.eos_token_id:
            answer = [*answer, tokenizer.eos_token_id]
        yield Rollout(tuple(ids), tuple(answer), (1,) * len(answer), float(unwanted) > 0)


def prompt_tokens(prompt: Any, tokenizer: Any) -> list[int]:
    """A text as it stands, or chat messages through the model's template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return list(
        tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False)
    )
