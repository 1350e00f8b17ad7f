"""Inside the sandbox: limits, input, and the way out for returned values. Runs alone, on the standard library.

Nothing here is secret or trusted. The candidate shares this process and may rewrite all of it; what it then sends is
still only data for the parent to compare.
"""

import json
import math
import os
import resource
import sys
import types

UNIT = {"memory_mb": 1 << 20, "file_mb": 1 << 20}
LIMITS = {
    "cpu_s": resource.RLIMIT_CPU,
    "memory_mb": resource.RLIMIT_AS,
    "file_mb": resource.RLIMIT_FSIZE,
    "files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
}
DEPTH = 50


def receive():
    """Say that the sandbox is up, read the job, apply its limits. Returns the job and the descriptor to answer on."""
    os.write(1, b"ready\n")
    with os.fdopen(os.dup(0), "rb") as stream:
        job = json.loads(stream.read())
    answer = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    os.close(quiet)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, value in job["limits"].items():
        resource.setrlimit(LIMITS[name], (value * UNIT.get(name, 1),) * 2)
    return job, answer


def send(answer, report):
    """Write the report, one line, and end at once: no exit handler or thread of the candidate's runs on."""
    data = json.dumps(report, allow_nan=False).encode() + b"\n"
    while data:
        data = data[os.write(answer, data) :]
    os._exit(0)


def load(job):
    """Run the candidate's source as the module ``candidate``."""
    module = sys.modules["candidate"] = types.ModuleType("candidate")
    for part in ("setup", "source"):
        exec(compile(job.get(part, ""), part, "exec"), module.__dict__)
    return module


def find(module, entry):
    """The function ``entry``, a name or ``Class().method``, of the candidate's module."""
    name, _, method = entry.partition("().")
    found = getattr(module, name)
    return getattr(found(), method) if method else found


def call(function, arguments):
    """One result: ["value", plain data] or ["error", what went wrong]."""
    try:
        return ["value", plain(function(*arguments["args"], **arguments.get("kwargs", {})))]
    except BaseException as error:
        return ["error", type(error).__name__]


def plain(value, depth=0):
    """``value`` itself when it is made of exactly None, bool, int, float, str, list and dict with str keys."""
    kind = type(value)
    if depth > DEPTH:
        raise ValueError("nested too deeply")
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is list:
        return [plain(item, depth + 1) for item in value]
    if kind is dict and all(type(key) is str for key in value):
        return {key: plain(item, depth + 1) for key, item in value.items()}
    raise TypeError(f"not plain data: {kind.__name__}")
