"""Two runs on one Ray would train on each other's rollouts: verl's TransferQueue is one per Ray."""

from __future__ import annotations

from typing import Any

import ray

from verl_grad_routing.errors import UserError

# transfer_queue/interface.py creates or finds it by this name, whoever asks.
NAME, NAMESPACE = "TransferQueueController", "transfer_queue"


def refuse_another_runs_queue(address: Any) -> None:
    """Say so when the queue that this run has joined was created by another run.

    Args:
        address: ``ray_kwargs.ray_init.address``, for the message.

    Raises:
        UserError: The queue belongs to another Ray job.
    """
    try:
        controller = ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return  # no queue yet: whoever creates it owns it
    owner, own = controller._actor_id.job_id.hex(), ray.get_runtime_context().get_job_id()
    if owner != own:
        fix = (
            f"another verl run (job {owner}) is at work on this Ray, and verl's TransferQueue is one per Ray: each "
            "would train on the other's rollouts; wait until it has ended, or use a Ray of its own (address=local)"
        )
        raise UserError("ray_kwargs.ray_init.address", address, fix)
