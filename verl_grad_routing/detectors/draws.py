"""Random draws that belong to one rollout: the same whatever its neighbours, ranks or order."""

from __future__ import annotations

import hashlib


def uniform(*of: object) -> float:
    """A number in [0, 1) for seed, step, name, ...: the first 53 bits of SHA-256 of them."""
    text = "/".join(str(part) for part in of)
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53
