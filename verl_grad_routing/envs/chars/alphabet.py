"""The characters of an environment and the tokens they become. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

PAD, UNKNOWN = "<pad>", "<unk>"
CONTEXT = 128  # positions of the model, far above prompt and response


@dataclass(frozen=True)
class Alphabet:
    """One token per character, after the padding and unknown tokens.

    Attributes:
        characters: In the order of their ids, each once.
        eos: The one of them that ends a sequence.
    """

    characters: str
    eos: str = "~"

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """All tokens by id."""
        return (PAD, UNKNOWN, *self.characters)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token."""
        return {token: index for index, token in enumerate(self.tokens)}

    @property
    def pad_id(self) -> int:
        return self.ids[PAD]

    @property
    def eos_id(self) -> int:
        return self.ids[self.eos]
