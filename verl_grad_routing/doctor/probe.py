"""Runs in a process of its own, started by ``registrations``: imports verl and tells, stage by stage, what it found.

One JSON object per stage on a line that starts with ``PREFIX``. A stage that raises ends the process; the traceback's
last line is then the finding.
"""

from __future__ import annotations

import json
import sys

PREFIX = "verl_grad_routing.doctor "


def _tell(stage: str, ok: bool, found: str) -> None:
    print(PREFIX + json.dumps({"stage": stage, "ok": ok, "found": found}), flush=True)


def main() -> None:
    """Import verl as a run would, and look into its registries."""
    import verl  # noqa: F401  (loads the entry points of the group verl.plugins)

    loaded = "verl_grad_routing.plugin" in sys.modules
    if not loaded:
        import verl_grad_routing.plugin  # noqa: F401  (shows the error that verl hides, if there is one)
    _tell("plugin", loaded, "loaded by verl" if loaded else "importable, but verl did not load it")

    from verl.plugin.platform.platform_manager import get_platform

    platform = get_platform()
    _tell("platform", True, f"{platform.device_name} ({platform.vendor_name})")

    from verl.workers.engine import EngineRegistry

    engines = EngineRegistry._engines.get("language_model", {}).get("routed_fsdp2", {})
    devices = sorted({key if isinstance(key, str) else key[0] for key in engines})
    _tell("engine routed_fsdp2", platform.device_name in devices, f"registered for {', '.join(devices) or 'no device'}")

    from verl.trainer.ppo.v1 import trainer_base

    trainers = sorted(trainer_base.TRAINER_REGISTRY)
    _tell("trainer grad_routing", "grad_routing" in trainers, f"registered trainers: {', '.join(trainers)}")


if __name__ == "__main__":
    main()
