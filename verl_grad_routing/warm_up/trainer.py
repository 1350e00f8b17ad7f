"""verl's SFT trainer as a process of its own: ``torchrun -m verl_grad_routing.warm_up.trainer key=value ...``.

verl's own entry point names the CPU twice when it joins the process group, so the group is joined here; the
configuration, the trainer and everything else are verl's, but for the seed of the order of the data.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from verl.plugin.platform import get_platform
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group_ray


class SeededSFTTrainer(SFTTrainer):
    """verl's, with the order of the data by ``trainer.seed``; verl 0.9.1 leaves its sampler's seed at 0."""

    def _build_dataloader(self) -> None:
        super()._build_dataloader()
        self.train_sampler.seed = self.config.trainer.seed


@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
def main(config: DictConfig) -> None:
    device = get_platform().device_name
    config.trainer.device = device
    initialize_global_process_group_ray(backend="cpu:gloo" if device == "cpu" else None)
    SeededSFTTrainer(config=config).fit()
    destroy_global_process_group()


if __name__ == "__main__":
    main()
