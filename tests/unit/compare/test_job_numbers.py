"""Numbers of Ray jobs are held machine-wide, by whoever trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from verl_grad_routing.compare import job_numbers
from verl_grad_routing.compare.job_numbers import reserved


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_numbers, "FOLDER", tmp_path)


def test_each_number_has_one_holder_at_a_time() -> None:
    with reserved() as first, reserved() as second, reserved(2) as third:
        assert (first, second, third) == (1, 2, 3)
    with reserved() as first, reserved(5) as fifth:
        assert (first, fifth) == (1, 5)


def test_another_process_sees_it_and_its_death_frees_it(tmp_path: Path) -> None:
    script = "import sys, pathlib; from verl_grad_routing.compare import job_numbers as j; "
    script += f"j.FOLDER = pathlib.Path({str(tmp_path)!r})\n"
    script += "with j.reserved() as n: print(n, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with reserved() as ours, subprocess.Popen([sys.executable, "-c", script], **pipes) as other:
        assert other.stdout is not None
        assert (ours, other.stdout.readline().strip()) == (1, "2")
        with reserved() as ours_too:
            assert ours_too == 3
        other.kill()
        other.wait(10)
        with reserved() as freed:
            assert freed == 2
