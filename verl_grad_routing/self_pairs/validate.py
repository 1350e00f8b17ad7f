"""Which generated pairs are fit to be pairs, and a count of why the others are not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from verl_grad_routing.errors import UserError
from verl_grad_routing.self_pairs.framings import Framings, Prompt

ACCEPTED = "accepted"
REASONS = {
    "empty": "a side is blank",
    "unfinished": "a side did not end within the token limit",
    "equal": "both sides are the same",
    "short": "a side has too few tokens",
    "lengths": "one side is too much longer than the other",
    "echo": "a side repeats its framing",
    "repeated": "the same two sides were accepted before",
}


@dataclass(frozen=True)
class Candidate:
    """What the model wrote for one prompt.

    Attributes:
        prompt: Without a framing.
        unwanted, wanted: Texts of the two sides.
        tokens: Their numbers of tokens, the end included.
        finished: Whether they ended by themselves.
    """

    prompt: Prompt
    unwanted: str
    wanted: str
    tokens: tuple[int, int]
    finished: tuple[bool, bool]


@dataclass(frozen=True)
class Limits:
    """What a pair must keep.

    Attributes:
        min_tokens: Least number of tokens of a side, the end included.
        max_ratio: Tokens of the longer side over those of the shorter at most; whatever differs ends up in the
            direction, length too.
    """

    min_tokens: int = 2
    max_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise UserError("--min-tokens", self.min_tokens, "give at least 1")
        if not self.max_ratio >= 1:
            raise UserError("--max-ratio", self.max_ratio, "give at least 1")


def verdict(candidate: Candidate, framings: Framings, limits: Limits) -> str:
    """``accepted``, or the first of ``REASONS`` that speaks against the pair (but for ``repeated``)."""
    sides = (candidate.unwanted, candidate.wanted)
    if not all(side.strip() for side in sides):
        return "empty"
    if not all(candidate.finished):
        return "unfinished"
    if candidate.unwanted.strip() == candidate.wanted.strip():
        return "equal"
    if min(candidate.tokens) < limits.min_tokens:
        return "short"
    if max(candidate.tokens) > limits.max_ratio * min(candidate.tokens):
        return "lengths"
    for side, framing in zip(sides, (framings.unwanted, framings.wanted), strict=True):
        if any(added in side for added in framing.added):
            return "echo"
    return ACCEPTED


@dataclass
class Tally:
    """Judges candidates one after the other, keeps the good ones and counts the rest."""

    framings: Framings
    limits: Limits
    accepted: list[Candidate] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, candidate: Candidate) -> str:
        """Judge one; ``repeated`` is what only the sequence knows."""
        found = verdict(candidate, self.framings, self.limits)
        sides = (candidate.unwanted.strip(), candidate.wanted.strip())
        if found == ACCEPTED and any(sides == (c.unwanted.strip(), c.wanted.strip()) for c in self.accepted):
            found = "repeated"
        if found == ACCEPTED:
            self.accepted.append(candidate)
        self.counts[found] += 1
        return found

    @property
    def tried(self) -> int:
        return sum(self.counts.values())

    @property
    def share_valid(self) -> float:
        return self.counts[ACCEPTED] / self.tried if self.tried else 0.0

    def describe(self) -> str:
        """One line: how many were tried and kept, and why the others were not."""
        reasons = ", ".join(f"{self.counts[reason]} {reason}" for reason in REASONS if self.counts[reason])
        return f"{len(self.accepted)} of {self.tried} kept" + (f" (rejected: {reasons})" if reasons else "")
