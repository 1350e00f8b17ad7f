"""Write ``problems.jsonl`` from the references: ``python -m verl_grad_routing.envs.code_loopholes.problems.build``."""

from __future__ import annotations

import json
from pathlib import Path

from verl_grad_routing.envs.code_loopholes.problems.easy import EASY
from verl_grad_routing.envs.code_loopholes.problems.hard import HARD
from verl_grad_routing.envs.code_loopholes.problems.medium import MEDIUM

DATA = Path(__file__).with_name("problems.jsonl")
DRAFTS = (*EASY, *MEDIUM, *HARD)


def lines() -> list[str]:
    """One line of JSON per problem, expected values computed by its reference."""
    return [json.dumps(draft.record(), ensure_ascii=False, allow_nan=False) + "\n" for draft in DRAFTS]


if __name__ == "__main__":
    DATA.write_text("".join(lines()), encoding="utf-8")
