"""Who confesses in a step, and whose rows the confessions take, so that the batch keeps its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_grad_routing.confessions.settings import ConfessionsConfig


@dataclass(frozen=True)
class Draw:
    """Row numbers of a batch of answers.

    Attributes:
        answers: Trained on their own reward.
        asked: Asked for confessions; of ``sealed`` none of them is in ``answers``.
        taught: Those of ``asked`` whose confessions are trained on.
        prompts: Number of confession prompts.
    """

    answers: tuple[int, ...]
    asked: tuple[int, ...]
    taught: tuple[int, ...]
    prompts: int


def draw(config: ConfessionsConfig, uids: Sequence[str], names: Sequence[str], seed: int, step: int) -> Draw:
    """Confession prompts by independent draws, the same in every run with these names, seed and step.

    The n answers of a confession prompt make room for n rows: ``sealed`` asks n / m answers m times and trains those
    confessions alone; ``seal_broken`` asks n / 2 answers, trains them with their penalty, and the confessions of
    n / (2 m) of them. Where every prompt was drawn the last one is spared: a batch has answers.

    Args:
        uids: Prompt of each row.
        names: What each row's prompt is called in every run (its index in the data).
    """
    from verl_grad_routing.detectors.draws import uniform  # the package of detectors imports torch

    groups: dict[str, list[int]] = {}
    for row, uid in enumerate(uids):
        groups.setdefault(uid, []).append(row)
    drawn = [
        uid
        for uid, rows in groups.items()
        if len(rows) >= config.divisor and uniform("confessions", seed, step, names[rows[0]]) < config.share
    ]
    if len(drawn) == len(groups) and config.sealed:
        drawn.pop()
    asked: list[int] = []
    taught: list[int] = []
    answers = [row for uid, rows in groups.items() if uid not in set(drawn) for row in rows]
    for uid in drawn:
        rows = groups[uid]
        chosen = rows[: len(rows) // config.per_answer] if config.sealed else rows[: len(rows) // 2]
        asked += chosen
        taught += chosen if config.sealed else rows[: len(rows) // config.divisor]
        answers += [] if config.sealed else chosen
    return Draw(tuple(sorted(answers)), tuple(asked), tuple(taught), len(drawn))
