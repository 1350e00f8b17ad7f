"""How each block is optimised: its parameter group, and what else its step does. All of it off unless asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl_grad_routing.config import BlockOptimConfig
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.hooks import Blocks, local


def parameter_groups(blocks: Blocks, settings: BlockOptimConfig, actor: Any) -> list[dict[str, Any]]:
    """One optimizer group a block; what a block does not set of its own stays ``actor.optim``'s.

    Args:
        blocks: Parameters of each block, and of ``shared`` where dense blocks have it.
        settings: ``grad_routing.blocks.optim``.
        actor: ``actor.optim``.
    """
    groups = []
    for name, parameters in blocks.items():
        group: dict[str, Any] = {"params": parameters, "block": name}
        if name == "quarantine" and settings.lr_ratio_quarantine != 1.0:
            group["lr"] = actor.lr * settings.lr_ratio_quarantine
        betas = getattr(settings, f"betas_{name}", None)
        if betas is not None:
            check_betas(actor.optimizer)
            group["betas"] = betas
        decay = decay_of(name, settings, actor)
        if settings.decay_to_start:
            group["weight_decay"] = 0.0  # the block's own step decays towards the start instead
        elif decay != actor.weight_decay:
            group["weight_decay"] = decay
        groups.append(group)
    return groups


def decay_of(block: str, settings: BlockOptimConfig, actor: Any) -> float:
    """Strength of a block's decoupled weight decay."""
    own = getattr(settings, f"weight_decay_{block}", None)
    return actor.weight_decay if own is None else own


def check_betas(optimizer: str) -> None:
    """Refuse betas for an optimizer that has none. Raises ``UserError``."""
    if "adam" not in optimizer.lower():
        fix = "a block's own betas need an Adam; unset them or set optimizer: AdamW"
        raise UserError("actor_rollout_ref.actor.optim.optimizer", optimizer, fix)


@dataclass(frozen=True, eq=False)
class DecayToStart:
    """``p ← p - lr λ (p - p₀)`` before the optimizer's step, which then decays nothing.

    Decay as AdamW has it, towards the weights that training started from and not towards zero: with a basis in A,
    decay towards zero would shrink the basis, and with blocks of the base model what that has learned. A block that is
    not stepped does not decay either. Keeps one copy of the blocks (``Adam`` keeps two).

    Attributes:
        starts: This rank's shards of the start, by block.
        strengths: λ of each block.
    """

    starts: Mapping[str, Sequence[Tensor]]
    strengths: Mapping[str, float]

    @classmethod
    def of(cls, blocks: Blocks, settings: BlockOptimConfig, actor: Any) -> DecayToStart | None:
        """At the parameters as they are now; ``None`` where it is off."""
        if not settings.decay_to_start:
            return None
        starts = {name: [local(p.detach()).clone() for p in block] for name, block in blocks.items()}
        return cls(starts, {name: decay_of(name, settings, actor) for name in blocks})

    def __call__(self, name: str, block: Sequence[torch.nn.Parameter], lr: float) -> None:
        """Decay the parameters of one block that have a gradient."""
        for parameter, start in zip(block, self.starts[name], strict=True):
            if parameter.grad is not None:
                here = local(parameter.detach())
                here.lerp_(start.to(here.device), lr * self.strengths[name])


def step_options(settings: BlockOptimConfig, decay: DecayToStart | None) -> dict[str, Any]:
    """What ``BlockStep`` takes beside optimizer, blocks and limits."""
    return {"jointly": settings.clip_jointly, "decay": decay, "freeze_inactive": settings.freeze_inactive}


def start_signature(blocks: Any) -> dict[str, Any]:
    """What a checkpoint says about the start that its run decays towards: all of it is computed anew on resume."""
    signature: dict[str, Any] = {"decay_to_start": blocks.optim.decay_to_start}
    if blocks.optim.decay_to_start:
        signature |= {"init": blocks.init, "seed": blocks.seed, "contrast": _content(blocks.contrast)}
    return signature


def check_same_start(saved: Mapping[str, Any], blocks: Any) -> None:
    """Refuse to resume towards another start. Raises ``UserError``."""
    now, before = start_signature(blocks), saved.get("start", {"decay_to_start": False})
    for key in dict.fromkeys((*now, *before)):  # decay_to_start first: without it the others have no meaning
        if now.get(key) != before.get(key):
            where = "grad_routing.blocks." + ("optim.decay_to_start" if key == "decay_to_start" else key)
            fix = f"the checkpoint's run has {before.get(key)!r}; set the same or start a new run"
            raise UserError(where, now.get(key), fix)


def _content(path: str | None) -> str | None:
    """SHA-256 of a file."""
    if path is None:
        return None
    import hashlib
    from pathlib import Path

    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
