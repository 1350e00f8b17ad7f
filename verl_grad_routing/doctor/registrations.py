"""Does verl load the plugin, and do the platform, the engine and the trainer register?

Importing verl takes many seconds and much memory, so it happens in a process of its own, with a time limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

from verl_grad_routing.doctor.checks import Check, Status
from verl_grad_routing.doctor.probe import PREFIX

STAGES = ("plugin", "platform", "engine routed_fsdp2", "trainer grad_routing")
FIXES = {
    "plugin": "unset VERL_USE_EXTERNAL_PLUGINS, or add verl_grad_routing to its list",
    "platform": "run `python -m verl_grad_routing.doctor.probe` for the whole traceback",
    "engine routed_fsdp2": "run `python -m verl_grad_routing.doctor.probe`; its warnings say what could not register",
    "trainer grad_routing": "run `python -m verl_grad_routing.doctor.probe`; its warnings say what could not register",
}


def entry_point_check(group: str) -> Check:
    """Is our entry point in ``group``? It is written at installation, so an older installation lacks it."""
    if any(entry.name == "verl_grad_routing" for entry in entry_points(group=group)):
        return Check(f"entry point {group}", Status.OK, "verl_grad_routing")
    return Check(f"entry point {group}", Status.FAIL, "missing", "install again: pip install -e . (or `make install`)")


def registration_checks(timeout: float = 180.0) -> Iterator[Check]:
    """One check per stage of ``probe``; stages after the first that raised are left out.

    Args:
        timeout: Seconds that importing verl's trainer may take.
    """
    command = [sys.executable, "-m", "verl_grad_routing.doctor.probe"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        fix = f"see where it hangs: {' '.join(command)}"
        yield Check("registrations", Status.FAIL, f"importing verl took over {timeout:.0f} s", fix)
        return
    lines = [line.removeprefix(PREFIX) for line in result.stdout.splitlines() if line.startswith(PREFIX)]
    told = {report["stage"]: report for report in map(json.loads, lines)}
    for stage in STAGES:
        if stage not in told:
            last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
            fix = "run `python -m verl_grad_routing.doctor.probe` for the whole traceback"
            yield Check(stage, Status.FAIL, last.strip(), fix)
            return
        ok, found = told[stage]["ok"], told[stage]["found"]
        yield Check(stage, Status.OK if ok else Status.FAIL, found, "" if ok else FIXES[stage])
