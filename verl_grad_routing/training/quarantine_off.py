"""Which rollouts of a step are sampled with the quarantine off, and how a key tells so.

The part that is sampled without the quarantine is submitted under prompt ids that end in ``-off``. verl's keys start
with the prompt's id, so every rollout says itself who sampled it, also when it is read back from a recorded batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from verl_grad_routing.detectors.draws import uniform
from verl_grad_routing.errors import UserError

MARK = "-off"


def part_size(share: float, total: int, what: str) -> int:
    """How many of ``total`` are sampled with the quarantine off.

    Raises:
        UserError: ``share`` is no whole number of them, or none, or all.
    """
    count = round(share * total)
    if abs(share * total - count) > 1e-6 or not 0 < count < total:
        fix = f"that is {share * total:g} of {total} {what}; give a multiple of 1/{total} between 0 and 1"
        raise UserError("grad_routing.quarantine_off_share", share, fix)
    return count


def drawn_prompts(count: int, total: int, seed: int, step: int) -> list[int]:
    """``count`` of ``total`` row numbers in order, drawn anew each step."""
    draws = sorted(range(total), key=lambda row: uniform(seed, "quarantine off", step, row))
    return sorted(draws[:count])


def off_rows(keys: Sequence[str]) -> Tensor:
    """Whether the rollout of each key was sampled with the quarantine off: int64 [N], 0 for pad rows."""
    return torch.tensor([int(prompt_of(key).endswith(MARK)) for key in keys], dtype=torch.int64)


def prompt_of(key: str) -> str:
    """The prompt's id in verl's key ``{prompt}_{session}_{index}``."""
    return key.rsplit("_", 2)[0]
