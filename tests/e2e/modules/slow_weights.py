"""Every hand-over of weights to the rollout engine takes some seconds longer and names itself in ``VGR_TEST_SYNCS``."""

from __future__ import annotations

import asyncio
import os
from types import ModuleType

from wrapt import register_post_import_hook, wrap_function_wrapper

PAUSE_S = 5.0


def _slow(module: ModuleType) -> None:
    async def send(wrapped, _, args, kwargs):
        with open(os.environ["VGR_TEST_SYNCS"], "a") as file:
            file.write("begun\n")
        await asyncio.sleep(PAUSE_S)
        return await wrapped(*args, **kwargs)

    wrap_function_wrapper(module, "BucketedWeightSender.async_send_weights", send)


register_post_import_hook(_slow, "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")
