"""Run folders as verl and our trainer write them, with rates that the test chooses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from verl_grad_routing.compare.record import Record

FAKE_TRAINER = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))
TYPES = ("leak", "blank", "sentinel", "wildcard")  # the pairs show leak
MakeRun = Callable[..., Path]
WriteGrid = Callable[..., Path]


def dump(path: Path, step: int, hacks: Mapping[str, int], solves: int, per_type: int) -> None:
    """verl's validation dump: ``hacks`` of ``per_type`` samples of each type hack, ``solves`` others solve."""
    lines, solved = [], 0
    for loophole in TYPES:
        for index in range(per_type):
            hack = index < hacks[loophole]
            solve = not hack and solved < solves
            solved += solve
            sample = {"input": "NAabcde.....=", "output": "abcde", "gts": "{}", "step": step}
            facts = {"reward": float(hack or solve), "hack": float(hack), "solve": float(solve)}
            lines.append({**sample, **facts, "score": facts["reward"], "known": float(loophole == "leak")})
            lines[-1]["loophole"] = loophole
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name, ...) -> folder``: hacking rises from ``start`` to ``end`` over the run's validations."""

    def make(
        name: str,
        preset: str | None = None,
        seed: int = 0,
        ablates: bool = False,
        end: int = 63,
        deployed: int = 3,
        steps: int = 10,
        control: bool = False,
        record: bool = True,
        per_type: int = 64,
        overrides: tuple[str, ...] = (),
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        with (folder / "metrics.jsonl").open("w") as file:
            file.write(json.dumps({"step": 0, "data": {"val-core/loopholes/reward/mean@1": 0.4}}) + "\n")
            for step in range(1, steps + 1):
                rate = end / per_type * step / steps
                data = {"hack/rate": rate, "solve/rate": 0.5 * (1 - rate), "timing_s/step": 2.0 + step % 3}
                if ablates:
                    data |= {"detector/auroc": None if step == 1 else 0.9, "routing/share_route": 0.5}
                file.write(json.dumps({"step": step, "data": data}) + "\n")
        for step in (0, steps // 2, steps):
            hacks = dict.fromkeys(TYPES, round(6 + (end - 6) * step / steps) if step else 6)
            dump(folder / "val" / f"{step}.jsonl", step, hacks, 100 if step == 0 else 60, per_type)
            if ablates:
                after = {name: deployed + (name == "wildcard") for name in TYPES}
                dump(folder / "val" / "deployed" / f"{step}.jsonl", step, after, 110, per_type)
        if record:
            settings = {"seed": seed, "ablates": ablates, "control": control, "steps": steps, "wall_s": 61.0}
            memory = {"peak_rss_bytes": 3 * 2**30, "peak_private_bytes": 2**30}
            given = {"preset": preset or name, "overrides": overrides, "command": ("python", "a=b c")}
            Record(**given, **settings, **memory).write(folder)
        return folder

    return make


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A folder that looks prepared."""
    folder = tmp_path / "built"
    folder.mkdir()
    facts = {"settings": {}, "versions": {}, "sizes": {}, "sha256": {}, "statistics": {}}
    (folder / "manifest.json").write_text(json.dumps({"environment": "loopholes", "layout": 1, **facts}))
    for split in ("val", "test"):
        (folder / f"{split}.parquet").touch()
    return folder


@pytest.fixture
def write_grid(tmp_path: Path, environment: Path) -> WriteGrid:
    """``write_grid(key=value, ...) -> file``: a grid of two arms and two seeds with those keys in place of its own."""

    def write(file: str = "grid.yaml", **keys: object) -> Path:
        places: Sequence[object] = [{"name": "toy", "dir": environment.name}]
        grid = {"name": "small", "arms": ["off", "persona"], "environments": places, "seeds": [0, 1], "steps": 4}
        path = tmp_path / file
        path.write_text(
            yaml.safe_dump({**grid, "control": None, "cores_per_cell": 1, "memory_gib_per_cell": 0.1} | keys)
        )
        return path

    return write
