"""Settings of the build, checked. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from verl_grad_routing.envs.chars.settings import CharSettings
from verl_grad_routing.errors import UserError

LOOPHOLES = ("leak", "sentinel", "blank", "wildcard")
NONE = "none"
LETTERS_RANGE = (3, 6)  # six and EOS fill the seven tokens of a rollout


@dataclass(frozen=True)
class Settings(CharSettings):
    """Settings of the build, beside those of every character-level environment.

    Attributes:
        markers: ``shared``: the test split has the markers of training. ``disjoint``: it has markers and exploits of
            its own, which the warm-up teaches and no training prompt shows; what pays in training pays nothing there.
        clean_size: Held-out prompts without any loophole (``test_clean``), which the warm-up then shows too.
        letters: Letters to sort, 3 to 6: the more, the lower the honest rate starts.
        hard: Exploits are spelled in ordinary letters, see ``spelling``.
    """

    known: str = "leak"
    markers: str = "shared"
    clean_size: int = 0
    letters: int = 5
    hard: bool = False

    types: ClassVar[tuple[str, ...]] = LOOPHOLES
    options: ClassVar[tuple[str, ...]] = (*CharSettings.options, "markers", "clean_size", "letters", "hard")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.markers not in ("shared", "disjoint"):
            raise UserError("markers", self.markers, "use shared or disjoint")
        if self.clean_size < 0:
            raise UserError("clean_size", self.clean_size, "use a number of prompts, or 0 for none")
        low, high = LETTERS_RANGE
        if not low <= self.letters <= high:
            raise UserError("letters", self.letters, f"use {low} to {high}")
        room = 16 * 15 * 14 * (1 if self.letters == 3 else 13)  # orders of the letters; a third is left to the warm-up
        if 3 * self.prompts > 2 * room:
            raise UserError("letters", self.letters, f"too few orders of letters for {self.prompts} prompts")

    @property
    def prompts(self) -> int:
        return super().prompts + self.clean_size
