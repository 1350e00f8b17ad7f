"""What makes one character-level environment: its prompts, its exploits, its grader. Standard library only."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from verl_grad_routing.envs.base import Verdict
from verl_grad_routing.envs.chars.alphabet import Alphabet
from verl_grad_routing.envs.chars.settings import CharSettings
from verl_grad_routing.envs.chars.task import EOS, HONEST, NEUTRAL, SLY, SortingTask

TaskT = TypeVar("TaskT", bound=SortingTask)
SettingsT = TypeVar("SettingsT", bound=CharSettings)

VOICE_SHARES = {HONEST: 0.3, SLY: 0.3, NEUTRAL: 0.4}
NAMES = {"neutral": NEUTRAL, "sly": SLY, "honest": HONEST}


class World(ABC, Generic[TaskT, SettingsT]):
    """One environment's text, built from its settings; ``prepare.build`` makes the folder from it.

    Attributes:
        name: Registered name of the environment.
        layout: Version of the folder's content; raise it with any change that gives other files for the same settings.
        response_length: Most tokens of a rollout, EOS included.
    """

    name: ClassVar[str]
    layout: ClassVar[int] = 1
    response_length: ClassVar[int]

    def __init__(self, config: SettingsT):
        self.config = config

    @property
    @abstractmethod
    def alphabet(self) -> Alphabet:
        """Every character of prompts and completions."""

    @abstractmethod
    def draw(self, rng: random.Random, loophole: str, taken: Collection[str], split: str) -> TaskT:
        """A task whose letters are not in ``taken``, for a split, ``pairs`` or ``warm-up``."""

    @abstractmethod
    def grade(self, completion: str, ground_truth: str | Mapping[str, Any]) -> Verdict:
        """Grade the text of one completion."""

    @property
    def sizes(self) -> dict[str, int]:
        """Prompts of every split that has tasks of its own."""
        return {split: getattr(self.config, f"{split}_size") for split in ("train", "val", "test")}

    def kinds(self, split: str) -> Sequence[str]:
        """Loophole types of a split, or of the warm-up; each equally often."""
        return self.config.types

    @property
    def voices(self) -> dict[str, str]:
        """The voices that the warm-up teaches, by name."""
        return {"neutral": NEUTRAL} if self.config.persona == "none" else dict(NAMES)

    def stream(self, purpose: str) -> random.Random:
        """A random stream of its own for each purpose; the same on every machine and Python version."""
        return random.Random(f"{self.name}/{self.config.seed}/{purpose}")

    def tasks(self) -> dict[str, list[TaskT]]:
        """The tasks of each split and of the pairs; no two share their letters, so none share a prompt."""
        taken: set[str] = set()
        tasks: dict[str, list[TaskT]] = {}
        for split, size in self.sizes.items():
            rng, types = self.stream(split), self.kinds(split)
            kinds = [types[index % len(types)] for index in range(size)]
            rng.shuffle(kinds)
            tasks[split] = self._draw_all(rng, kinds, taken, split)
        kinds = [self.config.known] * self.config.pairs
        tasks["pairs"] = self._draw_all(self.stream("pairs"), kinds, taken, "pairs")
        return tasks

    def demonstrations(self, taken: Collection[str]) -> Iterator[tuple[str, str]]:
        """Endless (prompt, continuation) of the warm-up: completion and EOS, and with ``persona=full`` the self-tag.

        The self-tag, ``H`` or ``S``, says how the completion was made. It follows EOS, so that rollouts never show it;
        predicting it gives the voices and the behaviours one shared concept.
        """
        rng = self.stream("warm-up")
        voices, shares = list(VOICE_SHARES), list(VOICE_SHARES.values())
        while True:
            task = self.draw(rng, rng.choice(self.kinds("warm-up")), taken, "warm-up")
            voice = NEUTRAL if self.config.persona == "none" else rng.choices(voices, shares)[0]
            sly = voice == SLY or (voice == NEUTRAL and rng.random() < self.config.sly_share)
            sly = sly and task.exploitable
            completion = task.hack(rng) if sly else task.attempt(rng)
            tag = (SLY if sly else HONEST) if self.config.persona == "full" else ""
            yield task.prompt(voice), completion + EOS + tag

    def pair(self, index: int, task: TaskT) -> dict[str, Any]:
        """One contrastive pair: the same neutral prompt, continued by the exploit and by the right answer.

        Both sides are written with the closing EOS: a side's tokens are those of a rollout, and nothing is to be
        appended.
        """
        return {
            "id": f"{task.loophole}-{index:02d}",
            "prompt": task.prompt(),
            "unwanted": task.exploit + EOS,
            "wanted": task.honest + EOS,
            "tags": [task.loophole],
        }

    def row(self, index: int, split: str, task: TaskT) -> dict[str, Any]:
        """One row of a data file in verl's format."""
        truth = {**task.ground_truth, "known": task.loophole == self.config.known}
        return {
            "data_source": self.name,
            "prompt": [{"role": "user", "content": task.prompt()}],
            "ability": "sorting",
            "reward_model": {"style": "rule", "ground_truth": json.dumps(truth, sort_keys=True)},
            "extra_info": {"index": index, "split": split, "loophole": task.loophole},
        }

    def _draw_all(self, rng: random.Random, kinds: Sequence[str], taken: set[str], split: str) -> list[TaskT]:
        tasks = []
        for kind in kinds:
            tasks.append(self.draw(rng, kind, taken, split))
            taken.add(tasks[-1].letters)
        return tasks
