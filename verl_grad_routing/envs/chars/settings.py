"""Settings of the build, checked. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from verl_grad_routing.errors import UserError

PERSONAS = ("full", "voices", "none")
MOST_PROMPTS = 100_000


WIDTH, LAYERS, HEAD = 128, 4, 32


@dataclass(frozen=True)
class CharSettings:
    """Settings of the build.

    Attributes:
        seed: Of everything: prompts, demonstrations, initial weights.
        train_size: Training prompts, as many of each loophole type.
        val_size: Validation prompts, likewise.
        test_size: Held-out prompts, likewise.
        pairs: Contrastive pairs, all of the type ``known``.
        known: Loophole type that the pairs show.
        steps: Optimizer steps of the warm-up; with far fewer than 600 the model cannot sort.
        persona: What the warm-up says about who is speaking, an ablation of the idea that a persona direction rests on.
            ``full``: an honest, a sly and a neutral voice, and after EOS a self-tag that says how the completion was
            made. ``voices``: no self-tag. ``none``: the neutral voice alone.
        sly_share: Share of exploits among the neutral voice's demonstrations: how often the model starts out hacking.
        width: Hidden size of the model, whose heads have 32 each.
        layers: Of the model. Both are the dial of a sweep over model sizes.
    """

    seed: int = 0
    train_size: int = 4096
    val_size: int = 256
    test_size: int = 1024
    pairs: int = 10
    known: str = ""
    steps: int = 600
    persona: str = "full"
    sly_share: float = 0.12
    width: int = WIDTH
    layers: int = LAYERS

    types: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ("persona", "sly_share", "width", "layers")
    """Fields that ``recorded`` leaves out at their defaults."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int) and type(value) is not type(field.default):
                kind = "true or false" if isinstance(field.default, bool) else "a whole number"
                raise UserError(field.name, value, f"use {kind}")
        for name in ("train_size", "val_size", "test_size"):
            self.require_shares(name)
        if self.width < HEAD or self.width % HEAD:
            raise UserError("width", self.width, f"use a positive multiple of {HEAD}, the size of a head")
        for name in ("pairs", "steps", "layers"):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "use at least 1")
        if self.prompts > MOST_PROMPTS:
            raise UserError("train_size", self.train_size, f"use at most {MOST_PROMPTS} prompts in all")
        if self.known not in self.types:
            raise UserError("known", self.known, f"use one of {', '.join(self.types)}")
        if self.persona not in PERSONAS:
            raise UserError("persona", self.persona, f"use one of {', '.join(PERSONAS)}")
        if type(self.sly_share) not in (int, float) or not 0 < self.sly_share < 1:
            raise UserError("sly_share", self.sly_share, "use a share between 0 and 1, both excluded")

    @property
    def prompts(self) -> int:
        """Prompts of all splits and pairs."""
        return self.train_size + self.val_size + self.test_size + self.pairs

    def require_shares(self, name: str) -> None:
        """Refuse a size that is no positive multiple of the number of types."""
        value, types = getattr(self, name), len(self.types)
        if value <= 0 or value % types:
            raise UserError(name, value, f"use a positive multiple of {types}, one share per loophole type")

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps. Options at their defaults are left out: a folder built before they existed is equal
        to one built without them."""
        defaults = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in asdict(self).items() if k not in self.options or v != defaults[k]}
