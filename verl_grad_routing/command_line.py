"""Catches on the command line what Hydra would silently accept as a new key: a misspelt ``+grad_routing``."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

CONF = Path(__file__).parent / "conf"
GROUPS = ("grad_routing", *sorted(f"grad_routing/{p.name}" for p in (CONF / "grad_routing").iterdir() if p.is_dir()))


def misspelt_group(override: str) -> str | None:
    """The group that an override such as ``+grad_rooting=persona`` probably means, or ``None``."""
    key = override.lstrip("+~").split("=", 1)[0].split("@", 1)[0]
    if not override.startswith("+") or key in GROUPS or "." in key:
        return None
    head = key.split("/", 1)[0]
    if head == "grad_routing" or difflib.get_close_matches(head, ["grad_routing"], cutoff=0.75):
        close = difflib.get_close_matches(key, GROUPS, n=1, cutoff=0.3)
        return close[0] if close else GROUPS[0]
    return None


def refuse_misspelt_groups(arguments: list[str]) -> None:
    """Exit with one line when an argument looks like a misspelt group of ours."""
    for argument in arguments:
        meant = misspelt_group(argument)
        if meant:
            sys.exit(f"{argument}: no such group, Hydra would take it as a new key; write +{meant}=<name>")
