"""Loophole environments: data, a model to start from, contrastive pairs and a grader, built by one command.

Importing this package costs the standard library only; torch and transformers come in while an environment is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl_grad_routing.envs import caps as _caps  # noqa: F401  (registers the environment)
from verl_grad_routing.envs import code_loopholes as _code_loopholes  # noqa: F401  (registers the environment)
from verl_grad_routing.envs import leaked_id as _leaked_id  # noqa: F401  (registers the environment)
from verl_grad_routing.envs import loopholes as _loopholes  # noqa: F401  (registers the environment)
from verl_grad_routing.envs import parquet as _parquet  # noqa: F401  (registers the environment)
from verl_grad_routing.envs import persona_bonus as _persona_bonus  # noqa: F401  (registers the environment)
from verl_grad_routing.envs import smollm2 as _smollm2  # noqa: F401  (registers the environment)
from verl_grad_routing.envs.base import ENVIRONMENTS, Environment, Verdict
from verl_grad_routing.envs.manifest import Manifest
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest

__all__ = [
    "ENVIRONMENTS",
    "Environment",
    "Manifest",
    "Verdict",
    "describe",
    "prepare_environment",
]


def prepare_environment(name: str, to: Path | str, *, force: bool = False, **options: Any) -> Manifest:
    """Build the environment ``name`` in the folder ``to``, or reuse what is complete there.

    Args:
        name: A name in ``ENVIRONMENTS``.
        to: Folder to create; a folder already built with the same options is reused in well under a second.
        force: Build anew, whatever options ``to`` was built with and even when it is damaged.
        options: Fields of the environment's ``Config``, e.g. ``seed=1``.

    Raises:
        UserError: Unknown environment or option, or ``to`` holds something else.
    """
    environment = ENVIRONMENTS.build({**options, "name": name}, "environment")
    return environment.prepare(Path(to), force=force)


def describe(name: str) -> str:
    """One line about the environment ``name``, for ``vgr list environments``."""
    if name not in ENVIRONMENTS:
        raise UserError("environment", name, nearest(name, list(ENVIRONMENTS)))
    return ENVIRONMENTS[name].describe()
