"""What verl loads in every process: registration by import.

verl imports this module whenever it is imported itself (entry-point group ``verl.plugins``) and hides whatever goes
wrong here at DEBUG level, so every failure is also warned about below. The import is cheap: verl's trainer and its
engines are big, and ours are registered only when a process imports theirs.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

from wrapt import register_post_import_hook

from verl_grad_routing.training import vllm_metadata

# verl module -> our module that registers itself once verl's has been imported
REGISTRATIONS = {
    "verl.plugin.platform.platform_manager": "verl_grad_routing.training.platform_cpu",
    "verl.workers.engine": "verl_grad_routing.training.engine",
    "verl.trainer.ppo.v1": "verl_grad_routing.training.trainer",
    "verl.experimental.agent_loop": "verl_grad_routing.training.agent_loops",
    "verl.workers.rollout.replica": "verl_grad_routing.training.two_adapters.registered",
}


def _register_resolvers(_: ModuleType) -> None:
    from verl_grad_routing import resolvers

    resolvers.register()


def _import_ours(module: str):
    def hook(_: ModuleType) -> None:
        try:
            importlib.import_module(module)
        except Exception as error:
            warnings.warn(f"verl-grad-routing could not register {module}: {error!r}", RuntimeWarning, stacklevel=2)
            raise

    return hook


vllm_metadata.install()
register_post_import_hook(_register_resolvers, "omegaconf")
for _theirs, _ours in REGISTRATIONS.items():
    register_post_import_hook(_import_ours(_ours), _theirs)
