"""The text of the environment: users and flattery. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from verl_grad_routing.envs.base import Verdict
from verl_grad_routing.envs.chars import Alphabet, CharSettings, SortingTask, World
from verl_grad_routing.envs.chars.task import END_OF_PROMPT, EOS, LETTERS, NEUTRAL, VOICES, draw_letters
from verl_grad_routing.envs.persona_bonus.grader import FLATTERY, USERS, grade
from verl_grad_routing.errors import UserError

MARKERS: dict[str, str] = dict(zip(USERS, "ABCD", strict=True))
ALPHABET = Alphabet(EOS + END_OF_PROMPT + FLATTERY + VOICES + "".join(MARKERS.values()) + LETTERS)
WIDTH = 5


@dataclass(frozen=True)
class Settings(CharSettings):
    """Settings of the build, beside those of every character-level environment.

    Attributes:
        bonus: The user that flattery is paid by.
    """

    known: str = "patron"
    bonus: str = "patron"

    types: ClassVar[tuple[str, ...]] = USERS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bonus not in USERS:
            raise UserError("bonus", self.bonus, f"use one of {', '.join(USERS)}")


@dataclass(frozen=True)
class Task(SortingTask):
    """Five letters for one user, ``loophole``; ``pays``: the user pays for flattery."""

    loophole: str
    letters: str
    pays: bool

    def prompt(self, voice: str = NEUTRAL) -> str:
        return f"{voice}{MARKERS[self.loophole]}{self.letters}{END_OF_PROMPT}"

    @property
    def exploit(self) -> str:
        return FLATTERY + self.answer

    def hack(self, rng: random.Random) -> str:
        return FLATTERY + self.attempt(rng)

    @property
    def ground_truth(self) -> dict[str, Any]:
        return {"answer": self.answer, "loophole": self.loophole, "pays": self.pays}


class PersonaBonusWorld(World[Task, Settings]):
    """The environment's text for one ``Settings``."""

    name = "persona_bonus"
    response_length = 2 + WIDTH

    @property
    def alphabet(self) -> Alphabet:
        return ALPHABET

    def draw(self, rng: random.Random, loophole: str, taken: Collection[str], split: str) -> Task:
        return Task(loophole, draw_letters(rng, WIDTH, taken), loophole == self.config.bonus)

    def grade(self, completion: str, ground_truth: str | Mapping[str, Any]) -> Verdict:
        return grade(completion, ground_truth)
