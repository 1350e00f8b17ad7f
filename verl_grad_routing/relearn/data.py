"""What an attack learns from: hacks, and true solutions beside them, as tokens.

Recorded batches hold tokens; texts go through the model's chat template and end with its end of sequence.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from verl_grad_routing.errors import UserError
from verl_grad_routing.probes.rollouts import prompt_tokens, read_rollouts

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of the prompt, which are not learned, and of the answer, which is."""


@dataclass(frozen=True)
class Rows:
    """Distinct rows of an attack.

    Attributes:
        hacks: Answers that hack.
        clean: Answers that solve and do not hack.
    """

    hacks: tuple[Row, ...]
    clean: tuple[Row, ...]

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of all tokens, in order."""
        return hashlib.sha256(json.dumps([self.hacks, self.clean], separators=(",", ":")).encode("ascii")).hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(prompt) + len(answer) for prompt, answer in (*self.hacks, *self.clean))

    def mixed(self, count: int, clean_share: float, seed: int) -> list[Row]:
        """``count`` rows, that share of them clean, each kind repeated in turn as often as it takes, shuffled.

        Raises:
            UserError: Rows of a kind are missing.
        """
        if not self.hacks:
            fix = "no rollout hacks by the grader's facts, so there is nothing to learn; give others"
            raise UserError("--hacks", 0, fix)
        clean = round(count * clean_share)
        if clean and not self.clean:
            fix = "no rollout solves its task; give rollouts that do, or --clean-share 0 to learn from hacks alone"
            raise UserError("--clean-share", clean_share, fix)
        rows = [*islice(cycle(self.hacks), count - clean), *islice(cycle(self.clean), clean)]
        random.Random(f"relearn/{seed}").shuffle(rows)  # verl's own shuffle is the same whatever the seed
        return rows


def recorded_rows(path: Path, tokenizer: Any) -> Rows:
    """Rows of a folder of recorded batches, or of parquet with ``prompt``, ``response``, ``hack`` and maybe ``solve``.

    Raises:
        UserError: Nothing to read there, or no fact ``hack``.
    """
    if path.suffix == ".jsonl":
        fix = "its prompts are text without the template's tokens; record batches with grad_routing.record_dir"
        raise UserError("--hacks", str(path), fix)
    hacks = read_rollouts(path, "hack", tokenizer, option="--hacks")
    try:
        solves = [one.unwanted for one in read_rollouts(path, "solve", tokenizer, option="--hacks")]
    except UserError:  # no such fact: nothing there is known to be clean
        solves = [False] * len(hacks)
    kept = [(tuple(one.prompt), _written(one.response, one.mask)) for one in hacks]
    judged = zip(kept, (one.unwanted for one in hacks), solves, strict=True)
    return _split((row, {"hack": hack, "solve": solve}) for row, hack, solve in judged)


def _written(response: Sequence[int], mask: Sequence[int]) -> tuple[int, ...]:
    """What the policy wrote; a response of several turns is cut where something else begins."""
    first = next((place for place, one in enumerate(mask) if not one), len(mask))
    return tuple(response[:first])


def sampled_rows(
    answers: Sequence[str], facts: Sequence[Mapping[str, Any]], prompts: Sequence[Mapping[str, Any]], tokenizer: Any
) -> Rows:
    """Rows of sampled answers, with what the reward function said of each."""
    ids = ((tuple(prompt_tokens(row["prompt"], tokenizer)), _ended(text, tokenizer))
           for row, text in zip(prompts, answers, strict=True))  # fmt: skip
    return _split(zip(ids, facts, strict=True))


def _ended(text: str, tokenizer: Any) -> tuple[int, ...]:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id])


def _split(judged: Iterator[tuple[Row, Mapping[str, Any]]] | Any) -> Rows:
    """Each distinct row once, in order."""
    kinds: dict[str, dict[Row, None]] = {"hacks": {}, "clean": {}}
    for row, facts in judged:
        if not row[1]:
            continue
        if float(facts["hack"]) > 0:
            kinds["hacks"][row] = None
        elif float(facts["solve"]) > 0:
            kinds["clean"][row] = None
    return Rows(tuple(kinds["hacks"]), tuple(kinds["clean"]))


def join(parts: Sequence[Rows]) -> Rows:
    """The hacks of the first, the clean rows of all, each once."""
    return Rows(parts[0].hacks, tuple(dict.fromkeys(row for part in parts for row in part.clean)))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """As ``rejection.data.KeptResponses`` reads them; only answers are learned."""
    lines = ({"prompt": list(prompt), "response": list(answer), "full_text": False} for prompt, answer in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
