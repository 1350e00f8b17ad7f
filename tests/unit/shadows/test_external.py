"""Another package's methods, found by an entry point on the path, as ``importlib.metadata`` sees it; no pip needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_grad_routing import cli

ROOT = Path(__file__).parents[3]
OUTSIDE = ROOT / "tests/modules/outside"
# In a process of its own: what is registered stays registered.
CODE = """
from verl_grad_routing import cli
from verl_grad_routing.config import parse
from verl_grad_routing.errors import UserError
from verl_grad_routing.shadows import build_shadows

def built(least):
    entry = {"name": "mine", "detector": {"name": "repetition", "least": least}, "intervention": {"name": "soften"}}
    return build_shadows(parse({"compare": [entry]}))[0].methods

methods = built(3)
print(sorted(methods.detector.reads), methods.detector.config.least, methods.intervention.config.factor)
try:
    built(1)
except UserError as error:
    print(error)
cli.main(["combinations"])
"""


def package(folder: Path, code: str) -> Path:
    """A package ``other`` whose entry point is a module with this code."""
    info = folder / "other-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl_grad_routing.methods]\nmine = other_module\n")
    (folder / "other_module.py").write_text(code)
    return folder


def test_its_methods_are_built_by_name_and_combined() -> None:
    paths = os.pathsep.join([str(OUTSIDE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=100)
    lines = found.stdout.splitlines()
    assert lines[0] == "['prompts', 'responses'] 3 0.5", found.stderr
    assert lines[1] == "grad_routing.compare.mine.detector.least=1: give at least 2 characters"
    row = next(line for line in lines if line.startswith("| `repetition`"))
    header = next(line for line in lines if line.startswith("| detector"))
    assert "`soften`" in header and row.split("|")[2].strip() == "monitor" and " no " not in row


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
def test_a_package_that_fails_is_named_in_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, words = BAD[case]
    monkeypatch.syspath_prepend(str(package(tmp_path, code)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["list", "detectors"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and len(err.strip().splitlines()) == 1
    for word in ["entry point verl_grad_routing.methods:mine", "other_module", "other cannot register", *words]:
        assert word in err
