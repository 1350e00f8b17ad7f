"""verl's vLLM server with two adapters, and its replica."""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator
from typing import Any

import ray
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_PATH
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from verl_grad_routing.training.two_adapters import ADAPTER, BOTH, DEPLOYED, DEPLOYED_ID, ROLLOUT


class ChoosingEngine:
    """vLLM's engine, in which a request's ``extra_args`` name the adapter; everything else is passed on."""

    def __init__(self, engine: Any):
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *, sampling_params: SamplingParams, lora_request: Any = None, **request: Any) -> AsyncGenerator:
        chosen = (sampling_params.extra_args or {}).get(ADAPTER, BOTH)
        if chosen == DEPLOYED:
            if lora_request is None:  # verl gives none as long as its own adapter has not arrived
                raise RuntimeError("a rollout was asked of the deployed adapter before the first weight sync")
            lora_request = LoRARequest(str(DEPLOYED_ID), DEPLOYED_ID, VLLM_LORA_PATH)
        return self._engine.generate(sampling_params=sampling_params, lora_request=lora_request, **request)


class TwoAdapterServer(vLLMHttpServer):
    """verl's server. Every rollout's ``extra_fields`` say which adapter sampled it."""

    def _get_worker_extension_cls(self) -> str:
        return "verl_grad_routing.training.two_adapters.extension.TwoAdapterExtension"

    async def run_server(self, args: argparse.Namespace) -> None:
        await super().run_server(_of_two(args))
        self.engine = ChoosingEngine(self.engine)

    async def run_headless(self, args: argparse.Namespace) -> None:
        await super().run_headless(_of_two(args))

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **options: Any
    ) -> TokenOutput:
        chosen = (sampling_params.get("extra_args") or {}).get(ADAPTER, BOTH)
        output = await super().generate(prompt_ids, sampling_params, request_id, **options)
        output.extra_fields[ADAPTER] = chosen
        return output


def _of_two(args: argparse.Namespace) -> argparse.Namespace:
    """verl asks for one adapter, behind everything that its configuration could say."""
    args.max_loras = args.max_cpu_loras = 2
    return args


class TwoAdapterReplica(vLLMReplica):
    """verl's replica of ``TwoAdapterServer``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(TwoAdapterServer)

    def _get_server_name_prefix(self) -> str:
        return f"{ROLLOUT}_"  # what the training ranks look for: the rollout's name
