"""Fingerprints of a micro-batch: verl's own forward, a backward pass that no parameter sees, nothing else.

A batch asks by the non-tensor ``gradient_probe``. It goes through verl's inference path, so neither gradients nor the
optimizer are touched, and FSDP2 is left as after a training step in which no parameter received a gradient.
"""

# The types that verl declares are narrower than what it passes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_from_nested

from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import Fingerprints, GradientProbe, GradientTaps, probed_modules
from verl_grad_routing.fingerprints.per_sample import Span, packed_spans, padded_spans

ASKED = "gradient_probe"


def gradient_probe(data: TensorDict) -> GradientProbe | None:
    """The probe that the rows of ``data`` are to be fingerprinted with, if they are."""
    return tu.get_non_tensor_data(data, ASKED, default=None)


def response_nll(*, model_output: dict[str, Any], data: TensorDict, **_: Any) -> tuple[Tensor, dict]:
    """Negative log-likelihood of the response tokens, summed over tokens and rollouts."""
    mask = data["response_mask"]
    log_probs = response_from_nested(model_output["log_probs"], mask)
    return -(log_probs.values().float() * mask.values()).sum(), {}


def fingerprint_step(engine: Any, probe: GradientProbe, forward_step: Callable, micro_batch: TensorDict) -> tuple:
    """``fingerprints`` [B, F] of ``micro_batch`` as verl's forward step would return them.

    Args:
        engine: The engine, for its decoder layers and its layout of tokens.
        forward_step: verl's own, of that engine.
    """
    layers = engine.probe.layers
    fingerprints = Fingerprints(probe, token_spans(engine, micro_batch))
    with torch.enable_grad(), checkpointing(layers), GradientTaps(probed_modules(layers, probe), fingerprints) as taps:
        loss, output = forward_step(micro_batch, loss_function=response_nll, forward_only=True)
        taps.backward(loss)
    output["model_output"] = {"fingerprints": fingerprints.normalised_BF}
    return loss.detach(), output


def token_spans(engine: Any, micro_batch: TensorDict) -> list[Span]:
    """Tokens of each rollout in the flattened inputs of a micro-batch. Raises ``UserError`` under Ulysses."""
    if engine.use_ulysses_sp:
        key = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
        raise UserError(key, engine.ulysses_sequence_parallel_size, "gradient fingerprints need 1")
    lengths = micro_batch["input_ids"].offsets().diff().tolist()
    if tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True):
        return packed_spans(lengths)
    return padded_spans(lengths, max(lengths))


@contextmanager
def checkpointing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Activation checkpointing as in training, without its dropout: the layers train, what is in them does not."""
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.training = was
