"""Token values beside the inputs: where a mask of rollouts or of their tokens lies in a micro-batch's layout.

Shapes: B rollouts, L tokens of one, T packed tokens (t: a sequence-parallel rank's part), S the padded length, N either
B or T.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_grad_routing.routing import expand_to_padded, expand_to_tokens, slice_for_sequence_parallel
from verl_grad_routing.training import masks

if TYPE_CHECKING:
    from verl_grad_routing.training.engine import RoutedFSDPEngine


def mask_beside(
    engine: RoutedFSDPEngine, micro_batch: TensorDict, model_inputs: dict, mask_N2: torch.Tensor
) -> torch.Tensor | None:
    """[1, T, 2] beside packed inputs, [B, S, 2] beside padded ones; ``None`` for a mask without effect.

    Args:
        mask_N2: Of rows [B, 2]; of their tokens one after another [T, 2] where ``masks.of_tokens`` says so.
    """
    if bool((mask_N2 == 1).all()):
        return None
    lengths_B = micro_batch["input_ids"].offsets().diff()
    by_token = masks.of_tokens(micro_batch)
    if tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True):
        return _packed(engine, mask_N2 if by_token else expand_to_tokens(mask_N2, lengths_B), pad_value=1.0)
    width = model_inputs["input_ids"].shape[1]
    if not by_token:
        return expand_to_padded(mask_N2, width)
    rows_L2 = mask_N2.split(lengths_B.tolist())
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, width - len(row)), value=1.0) for row in rows_L2])


def values_beside(
    engine: RoutedFSDPEngine, micro_batch: TensorDict, model_inputs: dict, rows_L2: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Values of every row's tokens in the same layouts, zero where there is no token."""
    if tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True):
        return _packed(engine, torch.cat(tuple(rows_L2)), pad_value=0.0)
    width = model_inputs["input_ids"].shape[1]
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, width - len(row))) for row in rows_L2])


def _packed(engine: RoutedFSDPEngine, values_T2: torch.Tensor, pad_value: float) -> torch.Tensor:
    """[1, t, 2]: padded as packed inputs are, and this rank's part where a sequence is shared."""
    static_pad = engine._get_packed_pad_size(values_T2.shape[0])
    values_1T2 = torch.nn.functional.pad(values_T2, (0, 0, 0, static_pad), value=pad_value).unsqueeze(0)
    if engine.use_ulysses_sp:
        rank = engine.ulysses_device_mesh["sp"].get_local_rank()
        values_1T2 = slice_for_sequence_parallel(
            values_1T2, rank, engine.ulysses_sequence_parallel_size, pad_value=pad_value
        )
    return values_1T2
