"""Labels of single rollouts: partial or noisy truth."""

from __future__ import annotations

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
        seed: int | None = None  # null: the run's seed

        def __post_init__(self) -> None:
            require_choice("types", self.types, TYPES)
            for dial in ("recall", "false_positive_rate", "clean_recall", "prompt_share"):
                require_number(dial, getattr(self, dial), 0, 1)
            if self.seed is not None:
                require_int("seed", self.seed, 0)

    config: Config

    @property
    def knows_everything(self) -> bool:
        return self.config.types == "all" and self.config.recall == self.config.prompt_share == 1

    def score(self, view: BatchView) -> Tensor:
        hack_B = self._fact(view, "hack")
        labelled_B = torch.ones_like(hack_B)
        if self.config.types != "all":
            labelled_B = self._fact(view, "known") == (self.config.types == "known")
        chance_B = torch.where(hack_B, self.config.recall * labelled_B.double(), self.config.false_positive_rate)
        seen_B = self._draws(view, "prompt", view.uids) < self.config.prompt_share
        flagged_B = seen_B & (self._draws(view, "flag", view.keys) < chance_B)
        trusted_B = torch.zeros_like(flagged_B)
        if self.config.clean_recall:
            drawn_B = self._draws(view, "clean", view.keys) < self.config.clean_recall
            trusted_B = seen_B & self._fact(view, "solve") & drawn_B & ~flagged_B
        return flagged_B.double() - trusted_B.double()

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
