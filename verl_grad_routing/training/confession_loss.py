"""Two losses in one backward pass: that of answers and that of confessions, each over its own rows and denominators.

A training batch asks for them by the column ``confession`` (B,): 1 is a confession, 0 an answer, -1 verl's padding.
Nothing that a confession holds, its length included, enters the answers' loss, and the reverse.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed import ReduceOp
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

from verl_grad_routing.training.columns import CONFESSION, PADDING

WEIGHT = "confession_weight"
"""Non-tensor of a training batch: factor of the confessions' loss, ``None`` for one vote a sample."""


def with_confessions(loss_function: Callable[..., Any], data: TensorDict, group: Any) -> Callable[..., Any]:
    """``two_losses`` for a mini-batch of which ``data`` is this rank's part; without the column the loss as it is."""
    if CONFESSION not in data:
        return loss_function
    weight = tu.get_non_tensor_data(data, WEIGHT, default=None)
    return two_losses(loss_function, *weighed(denominators(data, group), weight))


def weighed(counts_32: Tensor, weight: float | None) -> tuple[Tensor, float]:
    """What ``two_losses`` divides by, [2, 2] of answers and confessions, and the factor of the confessions.

    ``None`` gives every sample of the mini-batch one vote: N_c confessions beside N_a answers have the factor
    ``N_c / N_a``, whatever the draw gave, 1 without answers; padding is no sample. It counts rows and never tokens, so
    that no length of one kind scales the other. With a ``weight``, or without confessions, padding counts among the
    answers' rows, as verl has it.
    """
    answers_2, confessions_2, padding_2 = counts_32
    votes = weight is None and float(confessions_2[1]) > 0
    counts_22 = torch.stack((answers_2 if votes else answers_2 + padding_2, confessions_2))
    if weight is None:
        weight = float(confessions_2[1] / answers_2[1]) if answers_2[1] else 1.0
    return counts_22, weight


def denominators(data: TensorDict, group: Any) -> Tensor:
    """Tokens and rows of the whole mini-batch, float64 [3, 2]: answers, confessions, padding.

    Args:
        data: This rank's rows of the mini-batch.
        group: Ranks that share it.
    """
    tokens_B = torch.stack([mask.sum() for mask in data["loss_mask"].unbind()]).double()
    kinds_B = data[CONFESSION].to(tokens_B.device)
    each = [kinds_B == kind for kind in (0, 1, PADDING)]
    counts_32 = torch.stack([torch.stack((tokens_B[rows_B].sum(), rows_B.sum().double())) for rows_B in each])
    counts_32 = counts_32.to(get_device_id())
    torch.distributed.all_reduce(counts_32, op=ReduceOp.SUM, group=group)
    return counts_32.cpu()


def two_losses(loss_function: Callable[..., Any], counts_22: Tensor, weight: float) -> Callable[..., Any]:
    """``loss(answers; their counts) + weight * loss(confessions; their counts)`` in place of ``loss_function``.

    Each term sees its own rows alone. Metrics are those of the answers, and those of the confessions under
    ``confession/``. A micro-batch without rows of one kind has that term, and its metrics, as zero.
    """

    def loss(*, model_output: dict[str, Any], data: TensorDict, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        ours_B = data[CONFESSION] == 1
        terms = []
        for rows_B, (tokens, rows) in zip((~ours_B, ours_B), counts_22.tolist(), strict=True):
            part, output = _rows_of(data, model_output, rows_B)
            # at least 1: a kind that the whole mini-batch lacks has loss 0 / 1
            tu.assign_non_tensor(part, batch_num_tokens=max(int(tokens), 1), global_batch_size=max(int(rows), 1))
            terms.append(loss_function(model_output=output, data=part, **kwargs))
        (answers, metrics), (confessions, others) = terms
        return answers + weight * confessions, {**metrics, **_renamed(others)}

    return loss


def _rows_of(data: TensorDict, model_output: Mapping[str, Any], rows_B: Tensor) -> tuple[TensorDict, dict[str, Any]]:
    """Those rows of a micro-batch and of what the model said of it; one row that counts nothing where there is none."""
    rows = rows_B.nonzero().flatten().tolist()
    part = tu.index_select_tensor_dict(data, rows or [0])
    if not rows:
        part["response_mask"] = _jagged([torch.zeros_like(mask) for mask in part["response_mask"].unbind()])
    output = dict(model_output)
    for key, value in model_output.items():
        if isinstance(value, Tensor) and value.is_nested:
            per_row = value.unbind()
            output[key] = _jagged([per_row[row] for row in rows or [0]])
    return part, output


def _jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _renamed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"confession/{key.removeprefix('actor/')}": value for key, value in metrics.items()}
