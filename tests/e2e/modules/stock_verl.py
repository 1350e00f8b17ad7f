"""Stock verl's synchronous trainer, loaded by ``VERL_USE_EXTERNAL_MODULES``, for machines without an accelerator.

The one thing it changes: the worker makes its gloo group before verl does, because verl would name the cpu twice.
"""

from __future__ import annotations

from types import ModuleType

from wrapt import register_post_import_hook


def _register(_: ModuleType) -> None:
    import ray
    from verl.trainer.ppo.v1.trainer_base import register_trainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.utils.distributed import initialize_global_process_group_ray
    from verl.workers.engine_workers import ActorRolloutRefWorker

    class GlooWorker(ActorRolloutRefWorker):
        def __init__(self, *args, **kwargs):
            initialize_global_process_group_ray(backend="cpu:gloo")
            super().__init__(*args, **kwargs)

    @register_trainer("stock_sync")
    class StockTrainer(PPOTrainerSync):
        @property
        def trainer_mode(self) -> str:
            return "sync"

        @trainer_mode.setter
        def trainer_mode(self, _: str) -> None:
            return None

        def _init_resource_pool_mgr(self) -> None:
            super()._init_resource_pool_mgr()
            for role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(GlooWorker)


register_post_import_hook(_register, "verl.trainer.ppo.v1")
