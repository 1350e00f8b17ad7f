"""The registered class of a character-level environment: a ``World`` and one line about it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from verl_grad_routing.envs.base import Environment, Verdict
from verl_grad_routing.envs.chars.settings import CharSettings
from verl_grad_routing.envs.chars.world import World
from verl_grad_routing.envs.manifest import Manifest

SIZE = "0.86M-parameter char-level Llama trained from scratch, a minute or two on two cores"


class CharEnvironment(Environment):
    """Base of the environments that a ``World`` describes.

    Attributes:
        world: The environment's text.
        summary: What it is about, for a listing.
    """

    world: ClassVar[type[World[Any, Any]]]
    summary: ClassVar[str]
    config: CharSettings

    @property
    def known(self) -> tuple[str, ...]:
        return (self.config.known,)

    @classmethod
    def describe(cls) -> str:
        return f"{cls.summary}; {SIZE}"

    def prepare(self, to: Path, *, force: bool = False) -> Manifest:
        from verl_grad_routing.envs.chars.prepare import build

        return build(self.world(self.config), to, force=force)

    def grade(self, completion: str, ground_truth: str, row: Mapping[str, Any] | None = None) -> Verdict:
        return self.world(self.config).grade(completion, ground_truth)
