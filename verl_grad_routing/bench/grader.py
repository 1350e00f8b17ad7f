"""How many verdicts a second the sandboxed grader reaches, each in a bubblewrap of its own, on all cores.

One in four candidates is right, one returns wrong values, one raises, one ends its process; every verdict is checked.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from verl_grad_routing import __version__
from verl_grad_routing.envs.sandbox import Call, Limits, Pool, Task

TASK = Task("total", tuple(Call([list(range(size))], size * (size - 1) // 2) for size in range(20)))
CANDIDATES = (
    ("def total(numbers):\n    return sum(numbers)\n", True),
    ("def total(numbers):\n    return len(numbers)\n", False),
    ("def total(numbers):\n    return numbers[0] + numbers[10 ** 6]\n", False),
    ("import os\ndef total(numbers):\n    os._exit(0)\n", False),
)


def run_grader_bench(
    json_path: Path | None = None, verdicts: int = 1000, unsafe: bool = False, limits: Limits | None = None
) -> dict[str, Any]:
    """Reach ``verdicts`` verdicts, print the rate, and return (and write) the result.

    Returns:
        ``verdicts``, ``wrong`` (verdicts that are not as they must be), ``seconds``, ``per_second``, ``workers``,
        ``sandboxed``, ``load`` (the machine's load average before), ``versions``.

    Raises:
        SandboxError: No sandbox on this machine and ``unsafe`` is off.
    """
    load = os.getloadavg()[0]
    chosen = [CANDIDATES[index % len(CANDIDATES)] for index in range(verdicts)]
    with Pool(limits=limits, unsafe=unsafe) as pool:
        start = time.perf_counter()
        reports = pool.grade_all((source, TASK) for source, _ in chosen)
        seconds = time.perf_counter() - start
        workers = pool.workers
    wrong = sum(report.solved is not right for report, (_, right) in zip(reports, chosen, strict=True))
    result = {
        "verdicts": verdicts,
        "wrong": wrong,
        "seconds": seconds,
        "per_second": verdicts / seconds,
        "workers": workers,
        "sandboxed": not unsafe,
        "load": load,
        "versions": {"verl-grad-routing": __version__, "python": platform.python_version()},
    }
    kind = "no sandbox" if unsafe else "a sandbox each"
    print(
        f"grader: {verdicts} verdicts ({kind}) in {seconds:.1f} s on {workers} cores (load {load:.1f} before): "
        f"{verdicts / seconds:.1f}/s, {wrong} wrong"
    )
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    return result
