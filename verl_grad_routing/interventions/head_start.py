"""How long the quarantine has its head start: a number of steps, or until something that routing may see is reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MEASURES = ("flagged", "reward", "swapped_reward")
"""Of a step's rollouts the share that the gate flags, or the mean proxy reward; the latter of the quarantine alone."""


@dataclass
class HeadStart:
    """Steps 1 to ``steps``; with ``until`` it ends after the first step in which ``measure`` is at least that much.

    The measures are the gate's verdicts and the proxy reward: nothing that only the grader knows. ``swapped_reward`` is
    there after a validation with the deployed block ablated (``validate_swapped``).

    Attributes:
        steps: The last step of the head start, whatever the measure does.
        until: The rate that ends it sooner; ``None`` for none.
        measure: One of ``MEASURES``.
        reached: The step after which it ended, once it has.
    """

    steps: int
    until: float | None = None
    measure: str = "flagged"
    reached: int | None = None

    def in_force(self, step: int) -> bool:
        return step <= (self.steps if self.reached is None else min(self.steps, self.reached))

    def observe(self, step: int, measures: Mapping[str, float]) -> None:
        """What was measured in ``step``; the first time that it is enough counts."""
        if self.until is None or self.reached is not None or self.measure not in measures:
            return
        if measures[self.measure] >= self.until:
            self.reached = step

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reached = state["reached"]
