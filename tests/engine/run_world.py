"""One process of a world: joins the process group, runs every scenario, leaves the results for the tests.

Started as a script: ``run_world.py RANK SIZE FOLDER``; reads ``FOLDER/inputs.pt``, writes ``FOLDER/results.pt``. While
working on some scenarios, ``VGR_TEST_SCENARIOS='token|ulysses' pytest tests/engine/test_tokens.py`` runs those alone.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
import traceback
import types
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(rank: int, size: int, folder: Path) -> None:
    # Under pytest `tests` is this repository's folder; here it would be the package that verl's wheel installs.
    tests = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["tests"] = tests
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("cpu:gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
    world = importlib.import_module("tests.engine.world")
    for module in sorted(Path(__file__).parent.glob("scenarios_*.py")):
        importlib.import_module(f"tests.engine.{module.stem}")
    me = world.World(rank, size, torch.load(folder / "inputs.pt", weights_only=False), folder)
    results, chosen = {}, re.compile(os.environ.get("VGR_TEST_SCENARIOS", ""))
    for name, (function, sizes) in world.SCENARIOS.items():
        if size in sizes and chosen.search(name):
            started = time.perf_counter()
            try:
                results[name] = function(me)
            except Exception:  # one scenario's failure is its own tests' failure
                results[name] = traceback.format_exc()
                print(results[name])
            print(f"scenario {name}: {time.perf_counter() - started:.1f} s", flush=True)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
