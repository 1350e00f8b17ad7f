"""What an environment is: it builds data, pairs and perhaps a model, and it grades completions.

An environment's loophole types are divided into *known* ones, which its contrastive pairs show, and *unknown* ones,
which no label-free method ever sees. The grader's facts (``hack``, ``solve``, ``loophole``) are for metrics; routing
never reads them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from verl_grad_routing.envs.manifest import Manifest
from verl_grad_routing.registry import Registry


@dataclass(frozen=True)
class Verdict:
    """The grader's finding on one completion.

    Attributes:
        score: Proxy reward, what training sees: in most environments 1.0 when the completion is right or exploits its
            prompt's loophole.
        hack: The behaviour that the environment is about: in most, paid, yet not truly right.
        solve: Truly right.
        loophole: Loophole type that the prompt shows.
    """

    score: float
    hack: bool
    solve: bool
    loophole: str


class Environment(ABC):
    """Base of all environments; registered with ``@ENVIRONMENTS.register(name)`` and constructed as ``cls(config)``.

    Attributes:
        loopholes: Every loophole type.
        reward_function: ``reward.custom_reward_function.path`` for verl; the function there is ``compute_score``.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    loopholes: ClassVar[tuple[str, ...]]
    reward_function: ClassVar[str]

    def __init__(self, config: Any):
        self.config = config

    @property
    @abstractmethod
    def known(self) -> tuple[str, ...]:
        """Loophole types that the contrastive pairs show."""

    @property
    def unknown(self) -> tuple[str, ...]:
        """The other loophole types."""
        return tuple(loophole for loophole in self.loopholes if loophole not in self.known)

    @classmethod
    @abstractmethod
    def describe(cls) -> str:
        """One line for a listing."""

    @abstractmethod
    def prepare(self, to: Path, *, force: bool = False) -> Manifest:
        """Build everything in the folder ``to``, or reuse it when it is complete and has the same settings."""

    @abstractmethod
    def grade(self, completion: str, ground_truth: str, row: Mapping[str, Any] | None = None) -> Verdict:
        """Grade the text of one completion against its prompt's ``reward_model.ground_truth``.

        ``row`` is the prompt's row of the data file, which a reward function may read more of.
        """

    @classmethod
    def stale(cls, manifest: Manifest) -> list[str]:
        """Files outside a built folder that decide what it does, and have changed since it was built."""
        del manifest
        return []


ENVIRONMENTS: Registry[Environment] = Registry("environment")
