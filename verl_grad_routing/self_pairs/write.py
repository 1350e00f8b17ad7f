"""From a model and two framings to a pair file that every detector of pairs takes, and a report of how it was made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from verl_grad_routing.directions.pairs import MIN_PAIRS, Pair, content_hash, load_pairs, save_pairs
from verl_grad_routing.errors import UserError
from verl_grad_routing.self_pairs.framings import SIDES, Framing, Framings, Prompt, load_framings
from verl_grad_routing.self_pairs.generate import Answer, Writer
from verl_grad_routing.self_pairs.prompts import load_prompts
from verl_grad_routing.self_pairs.validate import REASONS, Candidate, Limits, Tally

TAG = "self-generated"


class Answers(Protocol):
    """What writes the sides: ``Writer``, or anything that answers prompts."""

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]: ...


@dataclass(frozen=True)
class SelfPairs:
    """How pairs are made.

    Attributes:
        model: Folder of the model that writes both sides.
        framings: YAML file of the two framings.
        prompts: The run's data (.parquet), or .jsonl.
        count: Pairs to keep.
        candidates: Prompts to try at most.
        min_share: Least share of valid candidates; below, the model does not follow the framings and the pairs that are
            left are a selection of it.
        batch_size: Prompts that are answered at once.
        max_new_tokens, temperature, seed: Of the sampling; the seed also orders the prompts.
        limits: What a pair must keep.
        chat: Switches of the model's chat template, see ``chat``.
    """

    model: Path
    framings: Path
    prompts: Path
    count: int = 24
    candidates: int = 240
    min_share: float = 0.1
    batch_size: int = 16
    max_new_tokens: int = 512
    temperature: float = 1.0
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    chat: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("count", MIN_PAIRS), ("batch_size", 1), ("max_new_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')}", getattr(self, name), f"give at least {least}")
        if self.candidates < self.count:
            raise UserError("--candidates", self.candidates, f"give at least --count, {self.count}")
        if not 0 <= self.min_share <= 1:
            raise UserError("--min-share", self.min_share, "give a share from 0 to 1")
        if not self.temperature > 0:
            raise UserError("--temperature", self.temperature, "give a positive number")


def write_pairs(
    settings: SelfPairs,
    to: Path,
    force: bool = False,
    log: Callable[[str], None] = print,
    writer: Answers | None = None,
) -> dict[str, Any]:
    """Write ``to`` (.jsonl) and, beside it, ``<name>.report.json``.

    Args:
        force: Replace files that are there.
        log: Receives one line per batch and one at the end.
        writer: In place of the model.

    Returns:
        The report: settings, hashes, counts by reason, share valid, mean lengths.

    Raises:
        UserError: Bad settings or files, too few valid pairs, or too small a share of them.
    """
    if to.suffix != ".jsonl":
        raise UserError("--to", str(to), "name a .jsonl file")
    report_file = to.with_suffix(".report.json")
    for file in (to, report_file):
        if file.exists() and not force:
            raise UserError("--to", str(file), "is there already; give another name, or --force")
    framings, prompts = load_framings(settings.framings), load_prompts(settings.prompts, settings.seed)
    if writer is None:
        sampling = (settings.max_new_tokens, settings.temperature, settings.seed)
        writer = Writer(settings.model, *sampling, chat=settings.chat)
    tally = _collect(settings, framings, prompts[: settings.candidates], writer, log)
    _require_enough(settings, tally)
    chosen = tally.accepted[: settings.count]
    pairs = [
        Pair(f"self-{number:04d}", candidate.prompt, candidate.unwanted, candidate.wanted, (TAG,))
        for number, candidate in enumerate(chosen, start=1)
    ]
    to.parent.mkdir(parents=True, exist_ok=True)
    save_pairs(pairs, to)
    report = _report(settings, framings, tally, pairs)
    report_file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_pairs(str(to)).content_hash == report["content_hash"]  # what was written is what will be read
    log(f"pairs: {to}, {len(pairs)} pairs of hash {report['content_hash'][:12]}")
    return report


def _collect(
    settings: SelfPairs, framings: Framings, prompts: list[Prompt], writer: Answers, log: Callable[[str], None]
) -> Tally:
    tally = Tally(framings, settings.limits)
    for start in range(0, len(prompts), settings.batch_size):
        batch = prompts[start : start + settings.batch_size]
        sides = [
            writer.answer([framing.of(prompt) for prompt in batch]) for framing in (framings.unwanted, framings.wanted)
        ]
        for prompt, unwanted, wanted in zip(batch, *sides, strict=True):
            tokens, finished = (unwanted.tokens, wanted.tokens), (unwanted.finished, wanted.finished)
            tally.add(Candidate(prompt, unwanted.text, wanted.text, tokens, finished))
        log(f"pairs: {tally.describe()}")
        if len(tally.accepted) >= settings.count:
            break
    return tally


def _require_enough(settings: SelfPairs, tally: Tally) -> None:
    first = max(REASONS, key=lambda reason: tally.counts[reason])
    why = f"; most often {first}: {REASONS[first]}" if tally.counts[first] else ""
    if tally.share_valid < settings.min_share:
        fix = f"{tally.describe()}{why}; change the framings, or lower --min-share"
        raise UserError("share of valid pairs", round(tally.share_valid, 3), fix)
    if len(tally.accepted) < settings.count:
        fix = f"{tally.describe()}{why}; give more --candidates and prompts, or a lower --count"
        raise UserError("valid pairs", len(tally.accepted), fix)


def _report(settings: SelfPairs, framings: Framings, tally: Tally, pairs: list[Pair]) -> dict[str, Any]:
    chosen = tally.accepted[: len(pairs)]
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
    return {
        "content_hash": content_hash(pairs),
        "framings_hash": framings.content_hash,
        "pairs": len(pairs),
        "tried": tally.tried,
        "share_valid": tally.share_valid,
        "rejected": {reason: tally.counts[reason] for reason in REASONS},
        "mean_tokens": {
            side: sum(candidate.tokens[index] for candidate in chosen) / len(chosen)
            for index, side in enumerate(("unwanted", "wanted"))
        },
        "settings": {**values, "limits": vars(settings.limits)},
        "framings": {side: _plain(getattr(framings, side)) for side in SIDES},
    }


def _plain(framing: Framing) -> dict[str, Any]:
    return {**vars(framing), "replace": dict(framing.replace)}
