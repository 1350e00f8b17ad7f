"""Masks beside inputs that sequence parallelism slices (the slicing alone: a run needs flash attention)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from verl.utils.ulysses import set_ulysses_sequence_parallel_group

from tests.engine.rollouts import with_token_routes
from tests.engine.world import World, batch, scenario


@scenario(2)
def ulysses(world: World) -> list[dict[str, Any]]:
    """Every rank's slice of inputs and masks; tokens are replaced by 1 + the index of their row, and where they have
    routes by 1 + their own."""
    found = []
    odd = (world.rollouts[:count] for count in range(len(world.rollouts), 0, -1))
    rows = next(rows for rows in odd if sum(len(row.tokens) for row in rows) % 2)  # so that there is something to pad
    for bucket, by_token in ((0, False), (16, False), (0, True), (16, True)):
        engine = world.engine(fsdp={"pad_to_length": bool(bucket), "pad_to_length_bucket": bucket or 1})
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "sp"))
        engine.ulysses_device_mesh, engine.ulysses_sequence_parallel_size, engine.use_ulysses_sp = mesh, 2, True
        data = batch(with_token_routes(rows) if by_token else rows, len(rows), weighted=True)
        offsets = data["input_ids"].offsets()
        numbered = torch.arange(1, len(rows) + 1).repeat_interleave(offsets.diff())
        numbered = torch.arange(1, len(numbered) + 1) if by_token else numbered
        data["input_ids"] = torch.nested.nested_tensor_from_jagged(numbered, offsets)
        set_ulysses_sequence_parallel_group(mesh["sp"].get_group())
        try:
            inputs, output_args = engine.prepare_model_inputs(data)
        finally:
            set_ulysses_sequence_parallel_group(None)  # type: ignore[arg-type]
        parts: list[Any] = [None, None]
        mine = (inputs["input_ids"], engine.context.forward_gate, engine.context.update_mask)
        dist.all_gather_object(parts, mine)
        found.append({"parts": parts, "pad": output_args["pad_size"], "tokens": len(numbered), "rows": len(rows)})
    return found
