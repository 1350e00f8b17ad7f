"""Dense blocks in files: the model as trained, with a switch for its quarantine, and the plain model without it."""

# transformers' models are typed as plain modules here.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from verl_grad_routing.deploy.checkpoint import Checkpoint
from verl_grad_routing.deploy.expansion import contract
from verl_grad_routing.deploy.models import load_model
from verl_grad_routing.deploy.shards import ShardedState
from verl_grad_routing.deploy.verify import logits_on, probe_tokens
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.dense import DenseBlocks, Shape, all_ablated, install_blocks


@dataclass(frozen=True)
class Measured:
    """All weights of a checkpoint in float32, and the training model's logits on ``probes`` by blocks."""

    weights: dict[str, Tensor]
    probes: list[Tensor]
    logits: dict[str, list[Tensor]]


def blocks_of(checkpoint: Checkpoint, model: nn.Module) -> DenseBlocks:
    """The blocks that the checkpoint names, checked against the model's shape."""
    layout = checkpoint.layout
    return DenseBlocks.from_layout({**layout.units, "shared": layout.shared}, Shape.of(model.config.to_dict()))


def measure(checkpoint: Checkpoint, base: str) -> Measured:
    """The model that was trained, measured with the quarantine acting and gated off in the forward pass.

    Raises:
        UserError: ``base`` is of another architecture than the checkpoint.
    """
    state = ShardedState(Path(checkpoint.actor))
    weights = {name: state[name].float() for name in state}
    model = _loaded(base, weights)
    context = install_blocks(model, blocks_of(checkpoint, model))
    probes, logits = probe_tokens(model), {}
    for name in ("both", "deployed"):
        context.ablated = name == "deployed"
        logits[name] = logits_on(model, probes)
    return Measured(weights, probes, logits)


def plain_model(checkpoint: Checkpoint, base: str, weights: dict[str, Tensor], ablate: bool) -> nn.Module:
    """An ordinary model with those weights; with ``ablate`` the quarantine's are zero.

    Units that ``vgr expand`` had added are not only zero then but gone: the model is of the original size.
    """
    model = _loaded(base, weights)
    if ablate:
        blocks = blocks_of(checkpoint, model)
        model.load_state_dict(dict(all_ablated(weights.items(), blocks)))
        if blocks.expansion is not None:
            contract(model, blocks.expansion)
    return model


def _loaded(base: str, weights: dict[str, Tensor]) -> nn.Module:
    model = load_model(base)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(own.keys() | weights.keys()):
        saved = tuple(weights[name].shape) if name in weights else None
        if saved != own.get(name):
            raise UserError(f"CHECKPOINT ({name})", saved, f"the base model {base} has {own.get(name)} there")
    model.load_state_dict(weights)
    return model
