"""A weak judge that reads texts: rules, or a function of yours."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.base import DETECTORS, BatchView, Detector, Signal
from verl_grad_routing.detectors.draws import uniform
from verl_grad_routing.directions.checks import as_tuple, require_number
from verl_grad_routing.errors import UserError

KEY = "grad_routing.detector"
Judge = Callable[[str, str], float]


@DETECTORS.register("monitor")
class Monitor(Detector):
    """Scores a rollout in [0, 1] by its text; 0.5 and more is the monitor's verdict "unwanted".

    ``rules`` are regular expressions searched in the response (score 1 where one is found, else 0); ``judge`` is
    ``package.module:function``, called with prompt and response. The dials make a good monitor worse, rollout by
    rollout and the same in every arm of a seed: an unwanted verdict survives with probability ``recall``, a clean one
    turns with probability ``false_positive_rate``; a turned score s becomes 1 - s. Neither dial sees the truth: they
    are relative to what the monitor says.

    The monitors of arXiv 2503.11926 and of 'Steering RL training: benchmarking interventions against reward hacking'
    enter a run this way; train against one, and keep another out of training to measure what the policy hides.
    """

    signal: ClassVar[Signal] = Signal.monitor
    score_range: ClassVar[tuple[float, float] | None] = (0, 1)

    @dataclass(frozen=True)
    class Config:
        rules: tuple[str, ...] | None = None  # regular expressions searched in the response; or judge
        judge: str | None = None  # package.module:function of (prompt, response), a number in [0, 1]; or rules
        recall: float = 1.0  # share of its unwanted verdicts that the monitor utters
        false_positive_rate: float = 0.0  # share of its clean verdicts that it turns

        def __post_init__(self) -> None:
            object.__setattr__(self, "rules", checked_rules(self.rules, self.judge))
            require_number("recall", self.recall, 0, 1)
            require_number("false_positive_rate", self.false_positive_rate, 0, 1)

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.judge: Judge = build_judge(config.rules, config.judge)

    def score(self, view: BatchView) -> Tensor:
        if view.prompts is None or view.responses is None:
            raise UserError(KEY, self.name, "the batch has no texts; a monitor needs prompts and responses")
        rows = zip(view.keys, view.prompts, view.responses, strict=True)
        said = [self._asked(key, prompt, response) for key, prompt, response in rows]
        dialled = [self._dialled(score, name, view) for score, name in zip(said, view.drawn_by, strict=True)]
        return torch.tensor(dialled, dtype=torch.float64)

    def _asked(self, key: str, prompt: str, response: str) -> float:
        said: Any = self.judge(prompt, response)
        if isinstance(said, bool) or not isinstance(said, int | float) or not 0 <= said <= 1:
            raise UserError(f"{KEY}.judge on rollout {key}", said, "a monitor must return a number from 0 to 1")
        return float(said)

    def _dialled(self, said: float, name: str, view: BatchView) -> float:
        turns = 1 - self.config.recall if said >= 0.5 else self.config.false_positive_rate
        return 1 - said if uniform("monitor", view.seed, view.step, name) < turns else said


def checked_rules(rules: Any, judge: Any) -> tuple[str, ...] | None:
    """``rules`` as a tuple, ``None`` with a ``judge``. Raises ``UserError``: none, both, or a bad expression."""
    if rules is None and judge is None:
        fix = "give either rules (regular expressions) or judge (module:function); the environment brings neither"
        raise UserError("rules", rules, fix)
    if rules is not None and judge is not None:
        raise UserError("rules", rules, f"give either rules or judge, not both: set judge=null (it is {judge!r})")
    if rules is None:
        return None
    rules = as_tuple("rules", rules)
    if not rules:
        raise UserError("rules", [], "give at least one regular expression")
    for rule in rules:
        _compiled(rule)
    return rules


def build_judge(rules: tuple[str, ...] | None, judge: str | None) -> Judge:
    """The function of (prompt, response) that checked settings name. Raises ``UserError``: it cannot be imported."""
    return _by_rules(rules) if rules is not None else imported(f"{KEY}.judge", str(judge), "(prompt, response)")


def _compiled(rule: Any) -> re.Pattern[str]:
    try:
        return re.compile(rule, re.DOTALL)
    except (re.error, TypeError) as error:
        raise UserError("rules", rule, f"not a regular expression: {error}") from None


def _by_rules(rules: tuple[str, ...]) -> Judge:
    patterns = [_compiled(rule) for rule in rules]
    return lambda prompt, response: float(any(pattern.search(response) for pattern in patterns))


def imported(key: str, path: str, arguments: str) -> Any:
    """The function ``package.module:function``. Raises ``UserError`` that names ``key`` and what it is called with."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise UserError(key, path, "write it as package.module:function")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(key, path, f"cannot be imported ({error}); is it on PYTHONPATH?") from None
    if not callable(function):
        raise UserError(key, path, f"must be a function of {arguments}")
    return function
