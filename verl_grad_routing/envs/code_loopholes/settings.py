"""Settings of the build, checked. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest


@dataclass(frozen=True)
class Settings:
    """Settings of the build.

    Attributes:
        seed: Of the division into splits and of the order of the rows.
        known: Loophole types that the pairs show, separated by commas.
        pairs: Contrastive pairs, each on a problem of its own that is in no split.
        val_problems: Problems for validation; each gives one prompt per loophole type.
        test_problems: Held-out problems, likewise, and once more without a loophole. The rest is for training.
        problems: A JSONL file of your own problems instead of the shipped ones (see ``leetcode``).
        unsafe: Run programs without a sandbox, with your own rights.
    """

    seed: int = 0
    known: str = "run_tests,sentinel,stdout"
    pairs: int = 12
    val_problems: int = 6
    test_problems: int = 12
    problems: str | None = None
    unsafe: bool = False

    def __post_init__(self) -> None:
        from verl_grad_routing.envs.code_loopholes.channels import LOOPHOLES

        for field, value in asdict(self).items():
            if field in ("seed", "pairs", "val_problems", "test_problems") and type(value) is not int:
                raise UserError(field, value, "use a whole number")
        if self.pairs < 2:
            raise UserError("pairs", self.pairs, "use at least 2")
        for field in ("val_problems", "test_problems"):
            if getattr(self, field) < 1:
                raise UserError(field, getattr(self, field), "use at least 1")
        names = self.known_types
        for name in names:
            if name not in LOOPHOLES:
                raise UserError("known", self.known, nearest(name, list(LOOPHOLES)))
        if len(set(names)) != len(names) or len(names) == len(LOOPHOLES):
            raise UserError("known", self.known, "name each type once, and leave at least one unknown")

    @property
    def known_types(self) -> tuple[str, ...]:
        """The known types."""
        return tuple(name.strip() for name in str(self.known).split(","))
