"""Settings of the build, checked. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from verl_grad_routing.envs.loopholes.text import LOOPHOLES
from verl_grad_routing.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Settings of the build.

    Attributes:
        seed: Of everything: prompts, demonstrations, initial weights.
        train_size: Training prompts, a multiple of four (one fourth per loophole type).
        val_size: Validation prompts, likewise.
        test_size: Held-out prompts, likewise.
        pairs: Contrastive pairs, all of the type ``known``.
        known: Loophole type that the pairs show.
        steps: Optimizer steps of the warm-up; with far fewer than 600 the model cannot sort.
    """

    seed: int = 0
    train_size: int = 4096
    val_size: int = 256
    test_size: int = 1024
    pairs: int = 10
    known: str = "leak"
    steps: int = 600

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if field != "known" and type(value) is not int:
                raise UserError(field, value, "use a whole number")
        for field in ("train_size", "val_size", "test_size"):
            value = getattr(self, field)
            if value <= 0 or value % len(LOOPHOLES):
                raise UserError(
                    field, value, f"use a positive multiple of {len(LOOPHOLES)}, one share per loophole type"
                )
        for field in ("pairs", "steps"):
            if getattr(self, field) < 1:
                raise UserError(field, getattr(self, field), "use at least 1")
        total = self.train_size + self.val_size + self.test_size + self.pairs
        if total > 100_000:
            raise UserError("train_size", self.train_size, "use at most 100000 prompts in all")
        if self.known not in LOOPHOLES:
            raise UserError("known", self.known, f"use one of {', '.join(LOOPHOLES)}")
