"""The gradient that a method would have produced, beside the run's own: forward and backward without a step.

A batch names its ``gradient_variants``. Each is the same rollouts under other masks and advantages, in columns of its
own; the first is the run's own method. Every gradient is that of the whole batch as one mini-batch, at the weights
before the step, before clipping and engine hooks. Weights, optimizer and random numbers stay as they are, bit for bit.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard
from verl.plugin.platform import get_platform
from verl.utils import tensordict_utils as tu

from verl_grad_routing.routing import RoutingTable
from verl_grad_routing.training.hooks import local
from verl_grad_routing.training.own_gate import CURRENT
from verl_grad_routing.training.random_state import same_random_state

ASKED = "gradient_variants"
COLUMNS = ("advantages", "response_mask", "loss_mask", "route")
OLD_LOG_PROBS = "variant_old_log_probs"
"""Column of the old log-probs with both blocks on, whatever the run's own method has made of them since."""


@dataclass(frozen=True)
class Variant:
    """A method's masks and advantages: column ``advantages`` of the engine is column ``{prefix}advantages``.

    Attributes:
        tables: What its routes mean, under the engine's names: ``routing_table``, and ``quarantine_off_table`` where
            rollouts are sampled so.
    """

    name: str
    prefix: str
    tables: Mapping[str, RoutingTable]


def compare_gradients(worker: Any, data: TensorDict) -> dict[str, float]:
    """``{name}/gradient_*`` of every variant after the first, the same on every rank.

    ``gradient_cosine`` with the first one over both blocks, ``gradient_cosine_deployed`` over the deployed block alone,
    ``gradient_norm_ratio`` over both; NaN where one of the two has no gradient.

    Args:
        worker: verl's training worker, for its engine, loss and batch settings.
        data: The rank's rows with the non-tensor ``gradient_variants``.
    """
    engine = worker.engine
    variants: Sequence[Variant] = tu.get_non_tensor_data(data, ASKED, default=None)
    _complete(worker, data)
    found: dict[str, float] = {}
    ours: dict[str, list[Tensor]] = {}
    with same_random_state(get_platform().device_name), engine.train_mode():
        try:
            for index, variant in enumerate(variants):
                engine.optimizer_zero_grad()
                engine.forward_backward_batch(_under(variant, data, variants), worker.loss_fn)
                if index == 0:
                    ours = {name: [_gradient(p).clone() for p in block] for name, block in _blocks(engine).items()}
                    continue
                found |= {f"{variant.name}/{key}": value for key, value in _compared(ours, _blocks(engine)).items()}
        finally:
            engine.optimizer_zero_grad()
            engine._gradients_anew = None  # it holds the batch
    return found


def _complete(worker: Any, data: TensorDict) -> None:
    """The settings that verl's worker gives every training batch that does not bring them."""
    config = worker.engine_config
    defaults = {
        "use_remove_padding": worker.model_config.get("use_remove_padding", False),
        "use_dynamic_bsz": config.use_dynamic_bsz,
        "max_token_len_per_gpu": config.max_token_len_per_gpu,
        "micro_batch_size_per_gpu": config.micro_batch_size_per_gpu,
        "use_fused_kernels": config.use_fused_kernels,
    }
    tu.assign_non_tensor(data, **{key: value for key, value in defaults.items() if key not in data})
    tu.maybe_fix_3d_position_ids(data)


def _under(variant: Variant, data: TensorDict, variants: Sequence[Variant]) -> TensorDict:
    """``data`` as the engine would train it under ``variant``: its own columns alone, under the engine's names."""
    extra = {f"{each.prefix}{column}" for each in variants for column in COLUMNS if each.prefix}
    chosen = data.exclude(*extra, OLD_LOG_PROBS, ASKED)
    for column in COLUMNS:
        chosen[column] = data[f"{variant.prefix}{column}"]
    if OLD_LOG_PROBS in data:
        chosen["old_log_probs"] = data[OLD_LOG_PROBS]
    # nothing has been stepped yet, so rows under another gate than they were sampled under start at ratio 1
    tu.assign_non_tensor(chosen, **variant.tables, **{CURRENT: True})
    return chosen


def _blocks(engine: Any) -> Mapping[str, list[torch.nn.Parameter]]:
    return engine.block_step.blocks


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(local(parameter.detach())) if gradient is None else local(gradient)


def _compared(ours: Mapping[str, list[Tensor]], blocks: Mapping[str, list[torch.nn.Parameter]]) -> dict[str, float]:
    sums = {name: _products(ours[name], parameters) for name, parameters in blocks.items()}
    both = [sum(values) for values in zip(*sums.values(), strict=True)]
    ratio = math.sqrt(both[2] / both[1]) if both[1] > 0 else math.nan
    return {
        "gradient_cosine": _cosine(*both),
        "gradient_cosine_deployed": _cosine(*sums["deployed"]),
        "gradient_norm_ratio": ratio,
    }


def _cosine(product: float, ours: float, theirs: float) -> float:
    return product / math.sqrt(ours * theirs) if ours > 0 and theirs > 0 else math.nan


def _products(ours: Sequence[Tensor], parameters: Sequence[torch.nn.Parameter]) -> list[float]:
    """Of a block, over all ranks, in float64: <ours, theirs>, <ours, ours>, <theirs, theirs>."""
    sums_3 = torch.zeros(3, dtype=torch.float64, device=ours[0].device)
    for one, parameter in zip(ours, parameters, strict=True):
        a, b = one.double(), _gradient(parameter).double()
        sums_3 += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
    first = parameters[0]
    if isinstance(first, DTensor):
        placements = [Partial() if isinstance(place, Shard) else place for place in first.placements]
        sums_3 = DTensor.from_local(sums_3, first.device_mesh, placements, run_check=False).full_tensor()
    return sums_3.tolist()
