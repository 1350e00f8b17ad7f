"""A noisy classifier of texts: any function of yours, called with a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from verl_grad_routing.detectors.base import DETECTORS, BatchView, Detector, Signal
from verl_grad_routing.detectors.draws import uniform
from verl_grad_routing.detectors.monitor import imported
from verl_grad_routing.directions.checks import require_int, require_number
from verl_grad_routing.errors import UserError

KEY = "grad_routing.detector"
Classify = Callable[[list[str], list[str]], Sequence[float]]


@DETECTORS.register("classifier")
class Classifier(Detector):
    """Scores rollouts by ``package.module:function``, called with a list of prompts and a list of responses.

    It returns one number per rollout in [``low``, ``high``], higher for the unwanted behaviour; it is given texts and
    nothing else. What it says of a rollout may depend on that rollout alone: it is called with ``batch_size`` rollouts
    at a time, in no order that means anything.

    ``flip_rate`` makes it worse: with that probability a score s becomes ``low + high - s``, rollout by rollout, by a
    draw from seed, step and the rollout's key, the same in every arm of a seed. An accuracy of a binary classifier that
    is right a share a of the time becomes ``a (1 - flip_rate) + (1 - a) flip_rate``.
    """

    signal: ClassVar[Signal] = Signal.monitor

    @dataclass(frozen=True, kw_only=True)
    class Config:
        function: str = ""  # required: package.module:function of (prompts, responses)
        low: float = 0.0  # least score that it may return
        high: float = 1.0  # and largest
        flip_rate: float = 0.0  # share of its scores that are turned round
        batch_size: int = 64  # rollouts of one call
        seed: int | None = None  # of the flips; null: the run's

        def __post_init__(self) -> None:
            if not isinstance(self.function, str) or not self.function:
                raise UserError("function", self.function, "give package.module:function of (prompts, responses)")
            for field in ("low", "high"):
                require_number(field, getattr(self, field))
            if self.low >= self.high:
                raise UserError("high", self.high, f"give more than low ({self.low:g})")
            require_number("flip_rate", self.flip_rate, 0, 1)
            require_int("batch_size", self.batch_size, 1)
            if self.seed is not None:
                require_int("seed", self.seed, 0)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.score_range = (config.low, config.high)
        self.classify: Classify = imported(f"{KEY}.function", config.function, "(prompts, responses)")

    def score(self, view: BatchView) -> Tensor:
        if view.prompts is None or view.responses is None:
            raise UserError(KEY, self.name, "the batch has no texts; a classifier needs prompts and responses")
        said: list[float] = []
        for start in range(0, len(view.keys), self.config.batch_size):
            rows = slice(start, start + self.config.batch_size)
            said += self._asked(view.keys[rows], list(view.prompts[rows]), list(view.responses[rows]))
        turned = [self._flipped(score, name, view) for score, name in zip(said, view.drawn_by, strict=True)]
        return torch.tensor(turned, dtype=torch.float64)

    def _asked(self, keys: Sequence[str], prompts: list[str], responses: list[str]) -> list[float]:
        """One call, checked."""
        said: Any = self.classify(prompts, responses)
        said = said.tolist() if hasattr(said, "tolist") else said
        count = len(said) if isinstance(said, Sequence) and not isinstance(said, str) else None
        if count != len(keys):
            fix = f"must return a sequence of {len(keys)} numbers, one per rollout, for {len(keys)} rollouts"
            raise UserError(f"{KEY}.function", type(said).__name__ if count is None else count, fix)
        low, high = self.config.low, self.config.high
        for key, score in zip(keys, said, strict=True):
            # NaN fails the comparison too
            if not isinstance(score, int | float | np.number) or not low <= float(score) <= high:
                fix = f"must return numbers from {low:g} to {high:g} (low and high)"
                raise UserError(f"{KEY}.function on rollout {key}", score, fix)
        return [float(score) for score in said]

    def _flipped(self, score: float, name: str, view: BatchView) -> float:
        seed = view.seed if self.config.seed is None else self.config.seed
        flips = uniform("classifier", seed, view.step, name) < self.config.flip_rate
        return self.config.low + self.config.high - score if flips else score
