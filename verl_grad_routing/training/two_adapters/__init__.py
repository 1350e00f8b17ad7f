"""Two adapters in one rollout engine, chosen by request: both blocks, or the deployed block alone.

An opt-in rollout of verl's, ``actor_rollout_ref.rollout.name=vllm_two_adapters``: vLLM as verl runs it, with one more
adapter that every worker makes of the synced one. The names below are all that trainer, workers and servers agree on;
what is registered imports vLLM only when it is used.
"""

from __future__ import annotations

ROLLOUT = "vllm_two_adapters"
"""Name of the rollout in verl's registries."""

ADAPTER = "grad_routing_adapter"
"""Key in ``SamplingParams.extra_args`` of a request, and in the ``extra_fields`` of its rollout: which adapter."""

BOTH, DEPLOYED = "both", "deployed"

DEPLOYED_ROWS = "grad_routing_deployed_rank"
"""Key of the adapter's configuration: how many of its first components are the deployed block's."""

DEPLOYED_ID = 124
"""vLLM's number of the deployed adapter; verl's own adapter is 123."""

SEEDED, CHOOSING = "seeded_single_turn_agent", "choosing_single_turn_agent"
"""Agent loops of this package, with seeded requests and without; the requests of both choose an adapter."""

SERVER_ADAPTER = "verl.workers.rollout.vllm_rollout.ServerAdapter"
"""verl's own class on the training ranks, which sends what it always sends."""
