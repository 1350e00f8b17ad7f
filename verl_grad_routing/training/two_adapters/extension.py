"""What a vLLM worker does beside verl's weight sync: the deployed block's adapter, made of the synced one.

Imported in vLLM's worker processes, by name.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from verl.utils.vllm import TensorLoRARequest
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_PATH, vLLMColocateWorkerExtension

from verl_grad_routing.training.two_adapters import DEPLOYED_ID, DEPLOYED_ROWS


class TwoAdapterExtension(vLLMColocateWorkerExtension):
    """verl's worker extension, which also keeps the deployed adapter: nothing more is sent than verl sends."""

    def _update_weights(
        self, weights: list[tuple[str, torch.Tensor]], peft_config: dict[str, Any], base_sync_done: bool
    ) -> None:
        super()._update_weights(weights, peft_config=peft_config, base_sync_done=base_sync_done)
        if not (peft_config and base_sync_done):
            return  # weights of the base model
        self.remove_lora(DEPLOYED_ID)  # vLLM keeps an adapter whose number it knows
        self.add_lora(
            TensorLoRARequest(
                lora_name=str(DEPLOYED_ID),
                lora_int_id=DEPLOYED_ID,
                lora_path=VLLM_LORA_PATH,
                peft_config=peft_config,
                lora_tensors=deployed_part(dict(weights), peft_config[DEPLOYED_ROWS]),
            )
        )


def deployed_part(tensors: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """The adapter without what is not among its first ``rows`` components: of the same rank, with columns of zeros.

    Args:
        tensors: By PEFT's names, ``lora_A`` [r, I] and ``lora_B`` [O, r]; they are copied.
    """
    part = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in part.items():
        if ".lora_B." in name:
            tensor[:, rows:] = 0
    return part
