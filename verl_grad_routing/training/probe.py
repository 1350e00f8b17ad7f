"""Reads the residual stream in a pass that verl runs anyway, and returns one row per rollout.

Three requests, carried by the batch as the non-tensor ``probe``:
``Pool(layers)`` returns the pooled activations themselves, for the contrastive pairs; ``Project(layers, vectors_DLd)``
returns their projections, for the rollouts of a step; ``AdjacentCosines(layers)`` says how much each layer turns them.
With a ``bottleneck`` the first two read its coordinates ``A x`` instead: L is then its modules and d its rank.
Shapes: B rollouts, L layers, D directions, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from verl_grad_routing.bottleneck import Bottleneck
from verl_grad_routing.directions import PoolPlan, project
from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import probed_modules
from verl_grad_routing.training.bases import Bases


@dataclass(frozen=True)
class Pool:
    """Return ``activation_pooled`` [B, L * d]: mean over the position's tokens after each layer (1-based)."""

    layers: tuple[int, ...]
    position: str = "resp_mean"  # one of directions.POSITIONS
    bottleneck: Bottleneck | None = None  # its coordinates in place of the residual stream


@dataclass(frozen=True, eq=False)
class Project:
    """Return ``activation_scores`` [B, D]: the pooled activations projected on D directions."""

    layers: tuple[int, ...]
    vectors_DLd: Tensor
    position: str = "resp_mean"
    bottleneck: Bottleneck | None = None


@dataclass(frozen=True)
class AdjacentCosines:
    """Return ``activation_pooled`` [B, L]: mean over tokens of the cosine between each layer's input and output."""

    layers: tuple[int, ...]
    position: str = "resp_mean"


Request = Pool | Project | AdjacentCosines


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the residual stream, found by the class names that transformers says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if names & {base.__name__ for base in type(m).__mro__}]
    if not layers:
        raise UserError("model._no_split_modules", sorted(names), "this architecture names no decoder layers to read")
    return layers


class ActivationProbe:
    """Forward hooks on every decoder layer that do nothing until a batch asks.

    Attributes:
        layers: The decoder layers.
        bases: Bases of the bottlenecks that are read.
    """

    def __init__(self, model: nn.Module):
        self.layers = decoder_layers(model)
        self.bases = Bases(self.layers)
        self._request: Request | None = None
        self._hidden: dict[int | str, Tensor] = {}
        self._on_modules: list[Any] = []  # hooks that a bottleneck needs, while it is read
        for index, layer in enumerate(self.layers, start=1):
            layer.register_forward_hook(self._hook(index), with_kwargs=True)

    def _hook(self, index: int) -> Callable:
        def keep(_module: nn.Module, inputs: tuple, named: dict, output: Tensor | tuple) -> None:
            if self._request is None or self._bottleneck is not None or index not in self._request.layers:
                return
            after = (output[0] if isinstance(output, tuple) else output).detach()
            if isinstance(self._request, AdjacentCosines):
                before = (inputs[0] if inputs else named["hidden_states"]).detach()
                self._hidden[index] = torch.cosine_similarity(before.float(), after.float(), dim=-1).unsqueeze(-1)
            else:
                self._hidden[index] = after

        return keep

    @property
    def active(self) -> bool:
        return self._request is not None

    @property
    def position(self) -> str:
        """Which tokens of a rollout the request is about."""
        assert self._request is not None
        return self._request.position

    def begin(self, request: Request | None) -> None:
        """Start listening for ``request`` (or stop). Raises ``UserError`` for a layer that the model has not."""
        self._hidden.clear()
        self._release()
        self._request = request
        if self._bottleneck is not None:
            return self._listen(self._bottleneck)
        for layer in request.layers if request is not None else ():
            if not 1 <= layer <= len(self.layers):
                fix = f"the model has layers 1 to {len(self.layers)}"
                raise UserError("grad_routing.detector.layers", layer, fix)

    @property
    def _bottleneck(self) -> Bottleneck | None:
        return getattr(self._request, "bottleneck", None)

    def _listen(self, bottleneck: Bottleneck) -> None:
        """Hooks that keep ``A x`` of every module of ``bottleneck``."""
        bases = self.bases.of(bottleneck)

        def keep(name: str) -> Callable:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
                x = inputs[0].detach()
                self._hidden[name] = x @ bases[name].read_rI.to(x).t()

            return hook

        modules = probed_modules(self.layers, bottleneck)
        self._on_modules = [module.register_forward_hook(keep(name)) for name, module in modules.items()]

    def _release(self) -> None:
        for handle in self._on_modules:
            handle.remove()
        self._on_modules = []

    def finish(self, plan: PoolPlan, flatten: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Pool what was heard.

        Args:
            plan: Which tokens belong to which rollout's completion.
            flatten: Turns a layer's output into hidden states ``[N, d]`` in the order of the plan's tokens.
        """
        assert self._request is not None
        bottleneck = self._bottleneck
        rows = self._request.layers if bottleneck is None else tuple(self.bases.of(bottleneck))
        pooled_BLd = torch.stack([plan.mean(flatten(self._hidden[row])) for row in rows], dim=1)
        self._hidden.clear()
        self._release()
        if isinstance(self._request, Project):
            return {"activation_scores": project(pooled_BLd, self._request.vectors_DLd.to(pooled_BLd.device))}
        return {"activation_pooled": pooled_BLd.flatten(1)}
