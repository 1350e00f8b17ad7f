"""What verl loads in every process: cheap, loud when it fails, and the CPU platform only where nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(180)

COST = """
import sys, time
import verl
from omegaconf import OmegaConf
started = time.process_time()
import verl_grad_routing.plugin
print(time.process_time() - started)
heavy = [m for m in sys.modules if m in ("ray", "vllm", "peft") or m.startswith("verl_grad_routing.routing")]
print([m for m in heavy if m.startswith("verl_grad")], "verl_grad_routing.training.engine" in sys.modules)
"""

PLATFORM = """
import verl
from verl.plugin.platform.platform_manager import PlatformRegistry, get_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA

if {present}:
    PlatformCUDA.is_platform_available = lambda self, use_smi_check=False: use_smi_check  # as in a cluster
print(type(get_platform()).__name__)
"""

BROKEN = """
import importlib, sys
sys.modules["verl_grad_routing.training.platform_cpu"] = None  # importing it fails
import verl
"""

SEARCH = """
from hydra import compose, initialize_config_module
with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("ppo_trainer", ["+grad_routing=absorb"])
print("found", config.grad_routing.preset)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, env=os.environ | environment, check=False
    )


def test_the_plugin_costs_a_process_without_a_trainer_little() -> None:
    done = python(COST, VERL_USE_EXTERNAL_PLUGINS="none")
    seconds, heavy = done.stdout.strip().splitlines()[-2:]
    assert float(seconds) <= 0.3
    assert heavy == "[] False"


@pytest.mark.parametrize(("present", "platform"), [(False, "PlatformCPU"), (True, "PlatformCUDA")])
def test_the_cpu_platform_is_chosen_only_where_no_accelerator_exists(present: bool, platform: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has an accelerator")
    done = python(PLATFORM.format(present=present))
    assert done.stdout.strip().splitlines()[-1] == platform, done.stderr[-2000:]


def test_a_failing_registration_is_warned_about() -> None:
    done = python(BROKEN)
    assert "verl-grad-routing could not register verl_grad_routing.training.platform_cpu" in done.stderr


def test_presets_are_on_the_search_path_of_any_hydra_application() -> None:
    done = python(SEARCH)
    assert "found" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("+grad_rooting=persona", "grad_routing"),
        ("+gradrouting=persona", "grad_routing"),
        ("+grad_routing/hardwares=cpu", "grad_routing/hardware"),
        ("+grad_routing/enviroment=loopholes", "grad_routing/environment"),
        ("+grad_routing=persona", None),
        ("+grad_routing/hardware=cpu", None),
        ("grad_routing.seed=1", None),
        ("+grad_routing.gate.window=3", None),
        ("+trainer.gradient=1", None),
        ("+data.extra=1", None),
    ],
)
def test_misspelt_groups_are_recognised(argument: str, meant: str | None) -> None:
    from verl_grad_routing.command_line import misspelt_group

    assert misspelt_group(argument) == meant


@pytest.mark.parametrize(
    "module", ["replay", "request_seeds", "agent_loops", "two_adapters.request", "two_adapters.registered"]
)
def test_what_users_may_import_first_registers_without_a_circle(module: str) -> None:
    done = python(f"import verl_grad_routing.training.{module}")
    assert done.returncode == 0 and "could not register" not in done.stderr, done.stderr[-2000:]


def test_every_group_of_ours_is_known() -> None:
    from verl_grad_routing.command_line import GROUPS, misspelt_group

    assert set(GROUPS) == {
        "grad_routing",
        *(f"grad_routing/{n}" for n in ("environment", "hardware", "rollout", "seeds")),
    }
    assert not any(misspelt_group(f"+{group}=one") for group in GROUPS)
