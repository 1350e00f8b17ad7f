"""Labels of single rollouts: partial or noisy truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from verl_grad_routing.detectors.base import DETECTORS, BatchView, Detector, Signal
from verl_grad_routing.detectors.draws import uniform
from verl_grad_routing.directions.checks import require_choice, require_int, require_number
from verl_grad_routing.errors import UserError

TYPES = ("all", "known", "unknown")


@DETECTORS.register("labels")
class Labels(Detector):
    """Score 1 for a rollout labelled as a hack, -1 for one labelled as clean, 0 for one without a label.

    A hack of a labelled type is flagged with probability ``recall``, a rollout that is no hack with probability
    ``false_positive_rate``; hacks of other types never are. A true solution that is not flagged is trusted with
    probability ``clean_recall``. So the discovery rate of SGTM (arXiv 2512.05648) is ``recall``, its
    false-positive rate ``false_positive_rate``, and labels on part of the prompts (oversight in
    Cloud et al., arXiv 2410.04332) are ``prompt_share``.

    Draws are uniform numbers from seed, step and the rollout's key (its prompt group for ``prompt_share``): they know
    no neighbour, and with the same seed a higher recall labels the same rollouts and more.

    ``type_recall`` gives single loophole types a recall of their own, by the name in the grader's fact ``loophole``.
    ``precision`` sets the false-positive rate of every batch so that this share of its flags is right in expectation:
    with hack share h and a share f of the hacks flagged, ``f h (1 - precision) / (precision (1 - h))``, at most 1; the
    one dial with which a score depends on the other rollouts. ``flip_rate`` then turns that share of the flags round,
    both ways, as a labeller of accuracy ``1 - flip_rate`` would.

    With full recall on all types of all prompts the labels are the truth: such a run is a control.
    """

    signal: ClassVar[Signal] = Signal.labels
    score_range: ClassVar[tuple[float, float] | None] = (-1, 1)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        types: str = "all"  # loophole types whose hacks may be labelled: all, known (the pairs show it) or unknown
        recall: float = 1.0  # share of those hacks that is flagged
        false_positive_rate: float = 0.0  # share of the rollouts without a hack that is flagged all the same
        clean_recall: float = 0.0  # share of the true solutions that is trusted, of those not flagged
        prompt_share: float = 1.0  # share of each step's prompts that is labelled at all
        type_recall: Mapping[str, float] | None = None  # loophole type -> recall of its hacks; others have recall
        precision: float | None = None  # share of the flags that is right; null: false_positive_rate says
        flip_rate: float = 0.0  # share of the rollouts of labelled prompts whose flag is turned round
        seed: int | None = None  # null: the run's seed

        def __post_init__(self) -> None:
            require_choice("types", self.types, TYPES)
            for dial in ("recall", "false_positive_rate", "clean_recall", "prompt_share", "flip_rate"):
                require_number(dial, getattr(self, dial), 0, 1)
            self._check_types_and_precision()
            if self.seed is not None:
                require_int("seed", self.seed, 0)

        def _check_types_and_precision(self) -> None:
            if self.type_recall is not None:
                if not isinstance(self.type_recall, Mapping) or not self.type_recall:
                    raise UserError("type_recall", self.type_recall, "give {loophole type: recall}, or null")
                for name, recall in self.type_recall.items():
                    require_number(f"type_recall.{name}", recall, 0, 1)
                if self.types != "all":
                    raise UserError("type_recall", dict(self.type_recall), f"set types=all, not {self.types}")
            if self.precision is not None:
                require_number("precision", self.precision, 0, 1)
                if self.precision == 0:
                    raise UserError("precision", self.precision, "give more than 0: no flag would be right")
                if self.false_positive_rate:
                    raise UserError("false_positive_rate", self.false_positive_rate, "set 0: precision decides")

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.judges_whole_batch = config.precision is not None

    @property
    def knows_everything(self) -> bool:
        config = self.config
        every_type = config.types == "all" and min([config.recall, *(config.type_recall or {}).values()]) == 1
        right = config.flip_rate == 0 and config.precision in (None, 1)
        return every_type and config.prompt_share == 1 and right

    def score(self, view: BatchView) -> Tensor:
        hack_B = self._fact(view, "hack")
        recall_B = self._recall(view)
        wrong = self._false_positive_rate(hack_B, recall_B)
        seen_B = self._draws(view, "prompt", view.prompts_drawn_by) < self.config.prompt_share
        flagged_B = self._draws(view, "flag", view.drawn_by) < torch.where(hack_B, recall_B, wrong)
        if self.config.flip_rate:
            flagged_B ^= self._draws(view, "flip", view.drawn_by) < self.config.flip_rate
        flagged_B &= seen_B
        trusted_B = torch.zeros_like(flagged_B)
        if self.config.clean_recall:
            drawn_B = self._draws(view, "clean", view.drawn_by) < self.config.clean_recall
            trusted_B = seen_B & self._fact(view, "solve") & drawn_B & ~flagged_B
        return flagged_B.double() - trusted_B.double()

    def _recall(self, view: BatchView) -> Tensor:
        """Chance of a flag for each rollout if it is a hack, float64 [B]."""
        config = self.config
        recall_B = torch.full((len(view.keys),), float(config.recall), dtype=torch.float64)
        if config.types != "all":
            recall_B *= self._fact(view, "known") == (config.types == "known")
        if config.type_recall is not None:
            types = self._types(view)
            own = [config.type_recall.get(name, config.recall) for name in types]
            recall_B = torch.tensor(own, dtype=torch.float64)
        return recall_B

    def _types(self, view: BatchView) -> tuple[str, ...]:
        """Loophole type of each rollout's prompt."""
        types = view.types
        if types is None:
            fix = "type_recall needs the grader's fact 'loophole', a text for every rollout"
            raise UserError("batch.facts", sorted(view.facts or {}), fix)
        return types

    def _false_positive_rate(self, hack_B: Tensor, recall_B: Tensor) -> float:
        config = self.config
        if config.precision is None:
            return config.false_positive_rate
        right, clean = float(recall_B[hack_B].sum()), int((~hack_B).sum())
        return min(1.0, right * (1 - config.precision) / (config.precision * clean)) if clean else 0.0

    def _fact(self, view: BatchView, name: str) -> Tensor:
        """A fact of the grader as booleans [B]."""
        facts = view.facts or {}
        if name not in facts:
            raise UserError("batch.facts", sorted(facts), f"these labels need the grader's fact {name!r}")
        return facts[name].to("cpu") > 0

    def _draws(self, view: BatchView, purpose: str, names: tuple[str, ...]) -> Tensor:
        """A uniform number for each name, float64 [B]; other purposes give independent ones."""
        seed = view.seed if self.config.seed is None else self.config.seed
        values = [uniform("labels", purpose, seed, view.step, name) for name in names]
        return torch.tensor(values, dtype=torch.float64)
