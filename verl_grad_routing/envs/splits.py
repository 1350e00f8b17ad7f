"""No prompt in two splits: told by the hash of its messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from verl_grad_routing.errors import UserError


def prompt_hash(prompt: Any) -> str:
    """SHA-256 (hex) of a prompt: a text, or a list of chat messages, whose order of keys does not count."""
    canonical = json.dumps(prompt, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def require_disjoint(splits: Mapping[str, Iterable[Any]]) -> None:
    """Refuse splits that share a prompt; a prompt may stand in one split several times.

    Args:
        splits: Name of the split to its prompts.

    Raises:
        UserError: Names the two splits and the row of the second.
    """
    owner: dict[str, str] = {}
    for split, prompts in splits.items():
        for index, prompt in enumerate(prompts):
            first = owner.setdefault(prompt_hash(prompt), split)
            if first != split:
                fix = f"this prompt is in {first} as well; keep every prompt in one split"
                raise UserError(f"{split} row {index}", str(prompt)[:60], fix)
