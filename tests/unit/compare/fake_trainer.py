"""Stands in for ``verl.trainer.main_ppo``: same arguments, same files, no training, numbers from preset and seed.

``FAKE_STARTS`` names a file that gets a line per start: run folder and first step. ``FAKE_PLAN`` is JSON, part of a run
folder's path -> what happens there: ``fail``, ``hang`` (after three steps) or ``slow``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

TYPES = ("leak", "blank")
PER_TYPE = 40

arguments = dict(argument.lstrip("+").split("=", 1) for argument in sys.argv[1:])
preset, seed = arguments["grad_routing"], int(arguments["grad_routing.seed"])
steps, save = int(arguments["trainer.total_training_steps"]), int(arguments["trainer.save_freq"])
every = int(arguments["trainer.test_freq"])
val, checkpoints = Path(arguments["trainer.validation_data_dir"]), Path(arguments["trainer.default_local_dir"])
folder = val.parent
plan = {key: do for key, do in json.loads(os.environ.get("FAKE_PLAN", "{}")).items() if key in str(folder)}
ablates = preset in ("persona", "random", "oracle")
detector = {"persona": "persona_act", "random": "random", "oracle": "oracle"}.get(preset, "constant")


def dump(step: int, view: str) -> None:
    """Hacks rise with steps; deletion takes them from persona, and half of them from random."""
    left = {"persona": 0.05, "random": 0.5, "oracle": 0.0}.get(preset, 1.0) if view == "deployed" else 1.0
    hacks = round(PER_TYPE * left * (0.2 + 0.7 * step / steps)) - (seed % 3 if left > 0.1 else 0)
    lines = []
    for loophole in TYPES:
        for index in range(PER_TYPE):
            hack = float(index < hacks)
            sample = {"hack": hack, "solve": float(not hack and index % 2), "known": float(loophole == "leak")}
            lines.append(json.dumps({**sample, "loophole": loophole, "step": step, "score": 1.0}))
    path = (val / "deployed" if view == "deployed" else val) / f"{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def validate(step: int) -> None:
    for view in ("trained", "deployed") if ablates else ("trained",):
        dump(step, view)


start = 0
latest = checkpoints / "latest_checkpointed_iteration.txt"
if arguments["trainer.resume_mode"] == "auto" and latest.is_file():
    start = int(latest.read_text())
with open(os.environ["FAKE_STARTS"], "a") as starts:
    starts.write(f"{folder.parent.name}/{folder.name} {start}\n")
hydra = Path(arguments["hydra.run.dir"]) / ".hydra"
hydra.mkdir(parents=True)
blocks = f"{{enabled: {str(preset != 'off').lower()}, ablate_at_deployment: {str(ablates).lower()}}}"
control = str(preset == "oracle").lower()
hydra.joinpath("config.yaml").write_text(
    f"trainer: {{total_training_steps: {steps}}}\n"
    f"grad_routing: {{seed: {seed}, control: {control}, detector: {{name: {detector}}}, blocks: {blocks}}}\n"
)
validate(start)
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as metrics:  # verl's logger empties it, too
    for step in range(start + 1, steps + 1):
        data = {"hack/rate": step / steps, "solve/rate": 0.5, "timing_s/step": 1.0, "start": start}
        if ablates:
            data |= {"detector/auroc": 0.8 if step > 1 else None, "routing/share_route": 0.25}
        metrics.write(json.dumps({"step": step, "data": data}) + "\n")
        metrics.flush()
        if step % every == 0 or step == steps:
            validate(step)
        if save > 0 and step % save == 0:
            (checkpoints / f"global_step_{step}" / "actor").mkdir(parents=True, exist_ok=True)
            latest.write_text(str(step))
        if "fail" in plan.values() and step == 2:
            raise ValueError(f"out of luck in {folder}, {__file__}")
        if "hang" in plan.values() and step == 3:
            time.sleep(600)
        if "slow" in plan.values():
            time.sleep(0.2)
