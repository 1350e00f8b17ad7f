"""Which adapter a rollout's request names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from verl_grad_routing.training.quarantine_off import MARK
from verl_grad_routing.training.two_adapters import ADAPTER, DEPLOYED, ROLLOUT

if TYPE_CHECKING:  # importing verl's agent loops registers ours, which import this module
    from verl.experimental.agent_loop import AgentLoopOutput


class ChosenAdapter:
    """In front of an agent loop, asks the deployed adapter for rollouts to be sampled with the quarantine off.

    ``class Mine(ChosenAdapter, MyAgentLoop)``; with another rollout than ``vllm_two_adapters`` requests are left alone.
    """

    rollout_config: Any

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        if self.rollout_config.name == ROLLOUT and str(kwargs.get("uid", "")).endswith(MARK):
            extra = {**(sampling_params.get("extra_args") or {}), ADAPTER: DEPLOYED}
            sampling_params = {**sampling_params, "extra_args": extra}
        return await super().run(sampling_params, **kwargs)  # type: ignore[misc]
