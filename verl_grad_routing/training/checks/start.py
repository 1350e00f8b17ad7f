"""What every run needs: its values, our trainer and engine, files, versions, a machine that is large enough."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_grad_routing.doctor import require
from verl_grad_routing.doctor.machine import ray_check, shm_check
from verl_grad_routing.doctor.versions import version_checks
from verl_grad_routing.errors import UserError
from verl_grad_routing.registry import nearest
from verl_grad_routing.training.checks.run import MISSING, Run, get


def mandatory_values(run: Run) -> None:
    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                walk(value, f"{path}.{index}")
        elif node == MISSING:
            raise UserError(path, MISSING, "this value is required; set it on the command line or in your YAML")

    walk(get(run.config, "grad_routing"), "grad_routing")


def trainer_mode(run: Run) -> None:
    mode = run.get("trainer.v1.trainer_mode")
    if mode != "grad_routing":
        fix = "presets need trainer.v1.trainer_mode=grad_routing (verl's synchronous mode with routing)"
        raise UserError("trainer.v1.trainer_mode", mode, fix)
    if not run.get("trainer.use_v1", True):
        raise UserError("trainer.use_v1", False, "routing lives in verl's v1 trainer; set trainer.use_v1=true")


def registrations(run: Run) -> None:
    from verl.trainer.ppo.v1 import trainer_base
    from verl.workers.engine.base import EngineRegistry

    strategy = run.get("actor_rollout_ref.actor.strategy")
    fix = "the plugin is not loaded in this process; check `vgr doctor` and unset VERL_USE_EXTERNAL_PLUGINS"
    if "grad_routing" not in trainer_base.TRAINER_REGISTRY:
        raise UserError("trainer.v1.trainer_mode", "grad_routing", fix)
    import verl.workers.engine  # noqa: F401  (registers verl's engines, and then ours)

    engines = EngineRegistry._engines["language_model"]
    if strategy not in engines:
        raise UserError("actor_rollout_ref.actor.strategy", strategy, nearest(str(strategy), list(engines)))


def files(run: Run) -> None:
    environment = run.settings.environment
    hint = f"; run: vgr prepare {environment.name} --to {environment.dir}" if environment.name else ""
    model = run.get("actor_rollout_ref.model.path")
    if model is None:
        raise UserError("actor_rollout_ref.model.path", None, "give the model's folder")
    try:
        _ = run.shape
    except UserError as error:
        local = str(model).startswith(("/", ".", "~")) or Path(str(model)).is_dir()
        raise UserError(error.key, error.value, f"{error.fix}{hint if local else ''}") from error
    for key in ("data.train_files", "data.val_files"):
        value = run.get(key)
        for name in value if isinstance(value, list) else [value]:
            if not str(name).startswith("hdfs:") and not Path(str(name)).expanduser().exists():
                raise UserError(key, name, f"no such file{hint}")


def replay(run: Run) -> None:
    folder = run.settings.replay_dir
    if folder is not None and not Path(folder).is_dir():
        raise UserError("grad_routing.replay_dir", folder, "no such folder; record one with grad_routing.record_dir")
    sampler = run.get("trainer.v1.sampler.custom_sampler.path")
    for key in ("replay_dir", "record_dir"):
        if sampler and getattr(run.settings, key) is not None:
            fix = f"grad_routing.{key} needs this package's replay buffer; unset one of the two"
            raise UserError("trainer.v1.sampler.custom_sampler.path", sampler, fix)


def versions(run: Run) -> None:
    require(version_checks())


def machine(run: Run) -> None:
    """Shared memory, and the resources of a Ray cluster that the run would join."""
    ranks_per_node = float(run.get("trainer.n_gpus_per_node", 1))
    gpus = ranks_per_node * float(run.get("trainer.nnodes", 1))
    checks = [shm_check()]
    if run.get("ray_kwargs.ray_init.address") != "local":
        checks.append(ray_check(gpus=gpus))
    require(checks)
