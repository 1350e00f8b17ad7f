"""A verl platform for machines without an accelerator, so that a laptop runs the same command as a cluster.

It becomes the platform only where no other platform is present on the host at all: the CPU-only Ray actors of a GPU
cluster see no device either, which is why the other platforms are asked with ``use_smi_check``.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportAssignmentType=false
from __future__ import annotations

import os
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _CpuModule(ModuleType):
    """``torch.cpu`` plus the memory queries that verl makes of a device; a CPU has no memory of its own to report."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def is_available() -> bool:
        return False  # what verl asks before it uses accelerator-only calls

    @staticmethod
    def max_memory_allocated(device: object = None) -> int:
        return 0

    memory_allocated = max_memory_reserved = memory_reserved = max_memory_allocated

    @staticmethod
    def mem_get_info(device: object = None) -> tuple[int, int]:
        return 0, 0

    @staticmethod
    def empty_cache() -> None:
        return None

    ipc_collect = reset_peak_memory_stats = empty_cache

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def get_device_name(device: object = None) -> str:
        return "CPU"


def _another_platform_is_present() -> bool:
    for name in PlatformRegistry.registered_names():
        platform = PlatformRegistry.get(name)
        if platform is not None and name != "cpu" and platform().is_platform_available(use_smi_check=True):
            return True
    return False


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """FSDP2 over gloo; ``ray`` counts logical "GPU"s, because verl's resource pools know GPUs and NPUs only."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CpuModule("verl_grad_routing.cpu")

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return not _another_platform_is_present()

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        return None

    profiler_stop = profiler_start

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        return {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}

    def cudart(self) -> None:
        return None
