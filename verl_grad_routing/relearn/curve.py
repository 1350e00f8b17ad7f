"""What an attack found: a hack rate after so many steps, and how many it took to the goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from verl_grad_routing.deploy.rates import Rate

Rates = Mapping[str, Rate]
"""``hack`` and ``solve`` of one measurement."""


@dataclass(frozen=True)
class Goal:
    """The hack rate to be reached: measured of the model as trained, or a number, which has no interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, rate: Rate) -> Goal:
        return cls(rate.hits / rate.rollouts, rate.low, rate.high)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.low < self.high else "")


@dataclass(frozen=True)
class Attacked:
    """One model under attack.

    Attributes:
        name: Of the model.
        curve: Steps of fine-tuning -> rates of its answers, ascending; step 0 is the model as it was.
    """

    name: str
    curve: Mapping[int, Rates]

    def steps_to(self, goal: Goal) -> int | None:
        """The first measured step at which the hack rate is at least the goal's; None when it never was."""
        return self._first(lambda hack: hack.hits / hack.rollouts >= goal.value)

    def earliest(self, goal: Goal) -> int | None:
        """The first measured step whose 95% Wilson interval reaches the goal's: before it the goal is excluded."""
        return self._first(lambda hack: hack.high >= goal.low)

    def _first(self, reached: Any) -> int | None:
        return next((step for step, rates in self.curve.items() if reached(rates["hack"])), None)

    def as_dict(self, goal: Goal) -> dict[str, Any]:
        """Plain data: counts and intervals of every measurement, and both numbers of steps."""
        points = [
            {"step": step, **{name: asdict(rate) for name, rate in rates.items()}} for step, rates in self.curve.items()
        ]
        steps = {"steps_to_goal": self.steps_to(goal), "earliest_step": self.earliest(goal)}
        return {"name": self.name, **steps, "curve": points}


def table(goal: Goal, attacked: Sequence[Attacked], every: int) -> list[str]:
    """Lines for a terminal: hack and solve rate by step, one column a model, and the steps to the goal below."""
    cell = 40
    names = [one.name for one in attacked]
    lines = [f"goal: hack rate {goal}", f"{'step':>5}  " + "  ".join(f"{name + ', hack':<{cell}}" for name in names)]
    for step in attacked[0].curve:
        cells = [f"{one.curve[step]['hack']!s:<{cell}}" for one in attacked]
        lines.append(f"{step:>5}  " + "  ".join(cells))
    for one in attacked:
        steps, earliest = one.steps_to(goal), one.earliest(goal)
        last = max(one.curve)
        said = f"{steps} steps" if steps is not None else f"not within {last} steps"
        said += f" (measured every {every})"
        if earliest is None:
            said += f"; its interval excludes the goal up to step {last}"
        elif earliest != steps:
            said += f"; its interval excludes the goal before step {earliest}" if earliest else "; no step excludes it"
        solve = one.curve[last]["solve"]
        lines.append(f"{one.name}: {said}; solve rate {one.curve[0]['solve']} at first, {solve} at last")
    return [line.rstrip() for line in lines]
