"""What routing costs in a whole step of real runs, generation and weight sync included.

``persona`` and ``vanilla_2r`` are trained in turns by ``python -m verl.trainer.main_ppo``, each pair starting with the
other arm than the pair before, and step n of one is compared with step n of the other: same prompts, same place in the
run. The first steps, in which both warm up, are dropped.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from verl_grad_routing.bench.statistics import ratio_interval
from verl_grad_routing.compare.demo import demo_overrides
from verl_grad_routing.compare.launch import launch
from verl_grad_routing.compare.record import machine, versions

ARMS = ("persona", "vanilla_2r")
DROPPED = 3
LIMIT_S = 1200.0
TIMINGS = {
    "whole step": "timing_s/step",
    "generation": "timing_s/gen",
    "routing and intervention": "timing_s/routing",
    "update_actor": "timing_s/update_actor",
}


def run_whole_bench(
    environment: Path, json_path: Path | None = None, pairs: int = 4, steps: int = 15
) -> dict[str, Any]:
    """Train ``pairs`` times both arms for ``steps`` steps, print the ratio of a whole step, and write every sample.

    Args:
        environment: A folder that ``vgr prepare loopholes`` wrote.
        json_path: File for the numbers.
        pairs: Runs of each arm.
        steps: Steps of each run; the first three are dropped.

    Raises:
        UserError: A run failed.
    """
    samples: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in TIMINGS} for arm in ARMS}
    quiet = ("trainer.val_before_train=false", "trainer.test_freq=-1")
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(pairs):
            for arm in ARMS if pair % 2 == 0 else ARMS[::-1]:
                overrides = [*demo_overrides(environment, steps, seed=pair), *quiet]
                run = launch(arm, Path(folder) / f"{arm}-{pair}", overrides, LIMIT_S)
                for name, key in TIMINGS.items():
                    if run.has(key):
                        samples[arm][name] += run.curve(key).values[DROPPED:].tolist()
    ratio = ratio_interval(samples["persona"]["whole step"], samples["vanilla_2r"]["whole step"])
    print(f"whole step       persona / vanilla_2r: {ratio}")
    results = {"whole_step": ratio.as_dict(), "samples_s": samples, "pairs": pairs, "steps": steps}
    results |= {"machine": machine(), "versions": versions()}
    if json_path is not None:
        Path(json_path).write_text(json.dumps(results, indent=2))
    return results
