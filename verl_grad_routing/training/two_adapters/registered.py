"""Puts the rollout into verl's two registries: of replicas, for the driver, and of rollouts, for the training ranks."""

from __future__ import annotations

from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from verl_grad_routing.training.two_adapters import ROLLOUT, SERVER_ADAPTER


def _load() -> type[RolloutReplica]:
    from verl_grad_routing.training.two_adapters.server import TwoAdapterReplica

    return TwoAdapterReplica


RolloutReplicaRegistry.register(ROLLOUT, _load)
base._ROLLOUT_REGISTRY[ROLLOUT, "async"] = SERVER_ADAPTER
