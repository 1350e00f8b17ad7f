"""How much of a step is the quarantine's. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

BLOCKS = ("deployed", "quarantine")


def quarantine_share(kind: str, norms: Mapping[str, float]) -> dict[str, float]:
    """``routing/<kind>_share/quarantine``: the quarantine's norm divided by the sum of both blocks' norms.

    The gradients' is ``qmass`` of wassname/vGROUT_pub, ``|g_q| / (|g_d| + |g_q|)``. Parameters of neither block do not
    count.

    Returns:
        Nothing where a block has no norm (dense blocks have none of updates), or both have norm 0.
    """
    if not set(BLOCKS) <= norms.keys():
        return {}
    both = sum(norms[name] for name in BLOCKS)
    return {f"routing/{kind}_share/quarantine": norms["quarantine"] / both} if both > 0 else {}
