"""Building the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl_grad_routing.envs.chars.prepare import build
from verl_grad_routing.envs.loopholes.settings import Settings
from verl_grad_routing.envs.loopholes.text import LoopholesWorld
from verl_grad_routing.envs.manifest import Manifest


def prepare(to: Path, *, force: bool = False, **settings: Any) -> Manifest:
    """Build the environment in the folder ``to``; see ``Settings`` for the settings.

    Raises:
        UserError: A bad setting, or ``to`` holds something else.
    """
    return build(LoopholesWorld(Settings(**settings)), to, force=force)
