"""Another package's methods, found by an entry point on the path, as ``importlib.metadata`` sees it; no pip needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OUTSIDE = ROOT / "tests/modules/outside"


def vgr(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own that sees the packages in ``path``."""
    paths = os.pathsep.join([str(path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "verl_grad_routing.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, timeout=100)


def package(folder: Path, code: str) -> Path:
    """A package ``other`` whose entry point is a module with this code."""
    info = folder / "other-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl_grad_routing.methods]\nmine = other_module\n")
    (folder / "other_module.py").write_text(code)
    return folder


def test_its_methods_are_listed_and_combined() -> None:
    found = vgr("combinations", path=OUTSIDE)
    assert found.returncode == 0, found.stderr
    row = next(line for line in found.stdout.splitlines() if line.startswith("| `repetition`"))
    header = next(line for line in found.stdout.splitlines() if line.startswith("| detector"))
    assert "`soften`" in header and row.split("|")[2].strip() == "monitor" and " no " not in row


def test_its_methods_build_by_name_and_check_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: what is registered stays registered."""
    code = """
from verl_grad_routing.config import parse
from verl_grad_routing.shadows import build_shadows
entry = {"name": "mine", "detector": {"name": "repetition", "least": %s}, "intervention": {"name": "soften"}}
shadow, = build_shadows(parse({"compare": [entry]}))
print(shadow.methods.detector.reads == {"prompts", "responses"}, shadow.methods.intervention.config.factor)
"""
    paths = os.pathsep.join([str(OUTSIDE), str(ROOT)])
    for least, told in ((3, "True 0.5"), (1, "grad_routing.compare.mine.detector.least=1: give at least 2")):
        command = [sys.executable, "-c", code % least]
        environment = os.environ | {"PYTHONPATH": paths}
        found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
        assert told in found.stdout + found.stderr, found.stderr


DETECTOR = """
from verl_grad_routing.detectors import DETECTORS, Detector
from verl_grad_routing.detectors.base import NoConfig
@DETECTORS.register({name!r})
class Mine(Detector):
    {config}
"""
BAD = {
    "a taken name": (DETECTOR.format(name="random", config="Config = NoConfig"), ["random", "pick another name"]),
    "no settings": (DETECTOR.format(name="mine", config="pass"), ["frozen dataclass named Config"]),
    "broken": ("import no_such_module_of_mine", ["ModuleNotFoundError", "no_such_module_of_mine"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_package_that_fails_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    code, words = BAD[case]
    found = vgr("list", "detectors", path=package(tmp_path, code))
    assert found.returncode == 2 and found.stdout == ""
    assert len(found.stderr.strip().splitlines()) == 1, found.stderr
    for word in ["entry point verl_grad_routing.methods:mine", "other_module", "other cannot register", *words]:
        assert word in found.stderr
