"""The sandbox around the grader: what it refuses, what it shows, how values are read and compared, how fast it is."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verl_grad_routing.bench.grader import run_grader_bench
from verl_grad_routing.doctor import Status
from verl_grad_routing.doctor.machine import sandbox_check
from verl_grad_routing.envs.sandbox import Call, Completed, Launcher, Limits, Pool, SandboxError, Task, decode, same
from verl_grad_routing.envs.sandbox import pool as pool_module
from verl_grad_routing.envs.sandbox.strict import judge
from verl_grad_routing.envs.sandbox.values import Invalid
from verl_grad_routing.errors import UserError

ADD = Task("add", (Call([1, 2], 3), Call(["é\0", "x"], "é\0x")))
HONEST = "def add(a, b):\n    print('on the way')\n    return a + b\n"


@pytest.fixture(scope="module")
def pool():
    with Pool(2, Limits(wall_s=5.0)) as pool:
        yield pool


SAME = [
    (1, 1), (-0, 0), ("é\0", "é\0"), ([1, [2]], [1, [2]]), ({"a": [True]}, {"a": [True]}), (None, None),
    (0.1 + 0.2, 0.3), (2.0, 2), (1e6, 1e6 + 0.5), (10**30, 10**30), ([], []), ({}, {}),
]  # fmt: skip
DIFFERENT = [
    (1, True), (True, 1), (0, False), (1, 1.0), (1, "1"), ([], {}), ([], None), ("", None), ([1], [1, 1]), (2.0, True),
    ({"a": 1}, {"b": 1}), ({"a": 1}, {"a": 1, "b": 2}), (1.0, 1.00001), (0.0, 1e-8), (2.0, 3), ([True], [1]),
    (False, None), ("e\u0301", "\u00e9"), (1e6, 1e6 + 1.5), (0.0, False), (None, 0),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "actual"), SAME)
def test_same_values(expected, actual):
    assert same(expected, decode(json.dumps(actual).encode()))


@pytest.mark.parametrize(("expected", "actual"), DIFFERENT)
def test_different_values(expected, actual):
    assert not same(expected, decode(json.dumps(actual).encode()))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"NaN",
        b"[Infinity]",
        b"1e999",
        b'{"a":1,"a":1}',
        b"[" * 100_000,
        b"\xff",
        b"9" * 1001,
        b"1 2",
        b"(1,)",
        b"'a'",
    ],
)
def test_what_is_no_value_is_refused(data):
    with pytest.raises(Invalid):
        decode(data)


LINES = [
    b'{"results": [["value", 3]]}', b'{"results": [["value", 3], ["value"]]}', b'{"results": [true, true]}', b"true",
    b'{"results": [["passed", 3], ["passed", 4]]}', b'{"results": [["error", 3], ["error", 4]]}', b"[]", b"", b"{}",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_report_passes_nothing(line):
    report = judge(Completed("line", line), ADD.calls)
    assert (report.end, report.passed, report.solved) == ("invalid", (False, False), False)


@pytest.mark.parametrize("end", ["exit", "timeout", "flood"])
def test_no_report_passes_nothing_and_no_test_solves_nothing(end):
    right = json.dumps({"results": [["value", call.value] for call in ADD.calls]}).encode()
    assert judge(Completed("line", right), ADD.calls).solved
    assert not judge(Completed(end, right, 0), ADD.calls).solved
    assert not judge(Completed("line", b'{"results": []}'), ()).solved


def test_the_candidate_gets_inputs_and_no_expected_value():
    job = json.dumps(Task("f", (Call([7], "the secret", {"key": 8}),)).job("source"))
    assert "secret" not in job and json.loads(job)["calls"] == [{"args": [7], "kwargs": {"key": 8}}]


def test_honest_candidates_pass(pool):
    assert pool.grade(HONEST, ADD).passed == (True, True)
    method = "class Solution:\n    def add(self, a, b=1): return a + b\n"
    assert pool.grade(method, Task("Solution().add", (Call([1], 3, {"b": 2}),), setup="import math")).solved
    mutable = Task("f", (Call([[2, 1]], [1, 2]), Call([[3]], [3])))
    assert pool.grade("def f(items):\n    items.sort()\n    return items\n", mutable).solved
    modern = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
    assert pool.grade(modern + "def f(items): return sorted(items)", mutable).solved
    assert pool.grade("def add(a, b): return 3", ADD).passed == (True, False)
    assert pool.grade("def add(a, b): raise KeyError", ADD).errors == ("KeyError", "KeyError")


def test_nobody_in_there_and_nothing_to_see(pool):
    body = "return [os.getuid() == 0, sorted(os.listdir('/tmp')), dict(os.environ), os.getpid() < 9]"
    source = f"import os\ndef look(): {body}"
    environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "HOME": "/tmp", "PATH": "/nonexistent", "PWD": "/tmp"}
    report = pool.grade(source, Task("look", (Call([], [False, [], environment, True]),)))
    assert report.solved
    listing = Task("look", (Call([], True),))
    assert pool.grade("import os\ndef look(): return not os.path.exists('/proc/self')", listing).solved
    assert pool.grade("import os\ndef look(): return os.path.exists('/etc/passwd')", listing).passed == (False,)


def test_a_sandbox_that_leaks_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(pool_module, "PACKAGE", Path("/sandbox"))
    with pytest.raises(SandboxError, match=r"leaks.*/sandbox"):
        Pool(1)


def test_no_sandbox_is_refused_in_one_line_that_says_what_unsafe_means(monkeypatch, tmp_path):
    for name in ("nowhere", "old", "broken"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho bubblewrap 0.6.1\n" if name == "old" else "#!/bin/sh\necho no >&2; exit 1\n"
        )
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nowhere").unlink()
    for name, what in (("nowhere", "not found"), ("old", "older than 0.7"), ("broken", "no")):
        monkeypatch.setenv("VGR_BWRAP", str(tmp_path / name))
        with pytest.raises(SandboxError, match=what) as error:
            Pool(1)
        line = str(error.value)
        assert "\n" not in line and "unsafe=True (--unsafe)" in line and "your own rights" in line
        assert str(pickle.loads(pickle.dumps(error.value))) == line


def test_no_user_namespaces_are_refused_with_bubblewraps_own_words(tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo bubblewrap 0.9.0; exit; }\n'
        "echo 'bwrap: No permissions' >&2; exit 1\n"
    )
    fake.chmod(0o755)
    with pytest.raises(SandboxError, match=r"No permissions.*user namespaces"):
        Pool(1, bwrap=str(fake))


def test_the_doctor_says_whether_there_is_a_sandbox(monkeypatch):
    assert sandbox_check().status is Status.OK
    monkeypatch.setenv("VGR_BWRAP", "/nowhere")
    assert sandbox_check().status is Status.WARN and "apt-get install bubblewrap" in sandbox_check().fix


def test_unsafe_runs_without_bubblewrap_and_still_compares(monkeypatch):
    monkeypatch.setenv("VGR_BWRAP", "/nowhere")
    with Pool(1, Limits(wall_s=5.0), unsafe=True) as pool:
        assert pool.launcher.unsafe and pool.grade(HONEST, ADD).solved
        assert not pool.grade("def add(a, b): return True", ADD).solved
        assert pool.grade("def add(a, b):\n    while True: pass", Task("add", (Call([1, 2], 3),))).end in (
            "exit",
            "timeout",
        )


def test_root_drops_to_an_ordinary_user_before_the_inner_sandbox(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    root = Launcher.find().command(Path("program.py"), Limits())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    user = Launcher.find().command(Path("program.py"), Limits())
    for word in ("--unshare-user", "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--new-session"):
        assert user.count(word) >= 1 and root.count(word) >= 1
    assert "--reuid" in root and "--reuid" not in user and root.index("--reuid") < root.index("--unshare-user")
    assert "--proc" not in user and "--proc" not in root and "--bind" not in user
    assert {"--die-with-parent", "--clearenv", "--remount-ro"} <= set(user)


def test_nothing_lives_on_when_the_parent_is_killed(tmp_path):
    """A parent that is killed takes its sandbox along."""
    program = f"""
from verl_grad_routing.envs.sandbox import *
with Pool(1, Limits(wall_s=60.0, cpu_s=60)) as pool:
    print("up", flush=True)
    pool.grade("import time\\ndef f(): time.sleep({os.getpid()}.0625)", Task("f", (Call([], 1),)))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
    deadline = time.monotonic() + 20
    while not (found := _descendants(parent.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    found |= _descendants(parent.pid)
    parent.kill()
    parent.wait()
    while any(_alive(pid) for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found and not any(_alive(pid) for pid in found)


def _descendants(pid: int) -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("bad", [{"wall_s": 0}, {"cpu_s": 1.5}, {"processes": 2}, {"files": True}, {"memory_mb": 1}])
def test_bad_limits_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Limits(**bad)


def test_the_bench_counts_verdicts(tmp_path, capsys):
    result = run_grader_bench(tmp_path / "grader.json", verdicts=12)
    assert json.loads((tmp_path / "grader.json").read_text()) == result
    assert result["wrong"] == 0 and result["sandboxed"] and result["per_second"] == 12 / result["seconds"]
    assert "12 verdicts" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_a_thousand_verdicts_at_fifteen_a_second():
    result = run_grader_bench(verdicts=1000)
    assert result["wrong"] == 0 and result["per_second"] >= 15
