"""``vgr doctor``: one line per check, with the fix for what fails.

Importing this package costs the standard library and ``packaging``; whatever imports verl runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from verl_grad_routing.doctor.checks import Check, Status, require
from verl_grad_routing.doctor.machine import machine_checks
from verl_grad_routing.doctor.registrations import entry_point_check, registration_checks
from verl_grad_routing.doctor.seams import seam_checks
from verl_grad_routing.doctor.versions import version_checks

__all__ = ["Check", "Status", "require", "run_checks"]


def run_checks() -> Iterator[Check]:
    """All checks, cheap ones first; the last ones import verl in another process and take seconds."""
    yield from version_checks()
    yield from machine_checks()
    yield from seam_checks()
    yield entry_point_check("verl.plugins")
    yield entry_point_check("vllm.general_plugins")
    yield from registration_checks()
