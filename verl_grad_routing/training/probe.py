"""Reads the residual stream in a pass that verl runs anyway, and returns one row per rollout.

Requests, carried by the batch as the non-tensor ``probe``:
``Pool(layers)`` returns the pooled activations themselves, for the contrastive pairs; ``Project(layers, vectors_DLd)``
returns their projections, for the rollouts of a step, and ``Projections`` those of several detectors at once;
``AdjacentCosines(layers)`` says how much each layer turns them.
Shapes: B rollouts, L layers, D directions, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verl_grad_routing.directions import PoolPlan, project
from verl_grad_routing.errors import UserError


@dataclass(frozen=True)
class Pool:
    """Return ``activation_pooled`` [B, L * d]: mean over the position's tokens after each layer (1-based)."""

    layers: tuple[int, ...]
    position: str = "resp_mean"  # one of directions.POSITIONS


@dataclass(frozen=True, eq=False)
class Project:
    """Return ``activation_scores`` [B, D]: the pooled activations projected on D directions."""

    layers: tuple[int, ...]
    vectors_DLd: Tensor
    position: str = "resp_mean"


@dataclass(frozen=True, eq=False)
class Projections:
    """Return ``column`` [B, D1 + D2 + ...]: what each ``Project`` asks for, side by side.

    Layers and positions may differ; each is read once. The numbers of a part are those that it gets alone, bit for bit.
    """

    parts: tuple[Project, ...]
    column: str = "activation_scores"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for part in self.parts for layer in part.layers}))


@dataclass(frozen=True)
class AdjacentCosines:
    """Return ``activation_pooled`` [B, L]: mean over tokens of the cosine between each layer's input and output."""

    layers: tuple[int, ...]
    position: str = "resp_mean"


Request = Pool | Project | Projections | AdjacentCosines


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the residual stream, found by the class names that transformers says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if names & {base.__name__ for base in type(m).__mro__}]
    if not layers:
        raise UserError("model._no_split_modules", sorted(names), "this architecture names no decoder layers to read")
    return layers


class ActivationProbe:
    """Forward hooks on every decoder layer that do nothing until a batch asks."""

    def __init__(self, model: nn.Module):
        self.layers = decoder_layers(model)
        self._request: Request | None = None
        self._hidden: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers, start=1):
            layer.register_forward_hook(self._hook(index), with_kwargs=True)

    def _hook(self, index: int) -> Callable:
        def keep(_module: nn.Module, inputs: tuple, named: dict, output: Tensor | tuple) -> None:
            if self._request is None or index not in self._request.layers:
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
    def positions(self) -> tuple[str, ...]:
        """Which tokens of a rollout the request is about, each position once."""
        assert self._request is not None
        parts = self._request.parts if isinstance(self._request, Projections) else (self._request,)
        return tuple(dict.fromkeys(part.position for part in parts))

    def begin(self, request: Request | None) -> None:
        """Start listening for ``request`` (or stop). Raises ``UserError`` for a layer that the model has not."""
        self._hidden.clear()
        self._request = request
        for layer in request.layers if request is not None else ():
            if not 1 <= layer <= len(self.layers):
                fix = f"the model has layers 1 to {len(self.layers)}"
                raise UserError("grad_routing.detector.layers", layer, fix)

    def finish(self, plans: Mapping[str, PoolPlan], flatten: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Pool what was heard.

        Args:
            plans: For each position, which tokens belong to which rollout.
            flatten: Turns a layer's output into hidden states ``[N, d]`` in the order of the plans' tokens.
        """
        request = self._request
        assert request is not None
        hidden = {layer: flatten(self._hidden[layer]) for layer in request.layers}
        self._hidden.clear()
        pooled: dict[tuple[str, int], Tensor] = {}

        def pooled_BLd(part: Pool | Project | AdjacentCosines) -> Tensor:
            for layer in part.layers:
                if (part.position, layer) not in pooled:
                    pooled[part.position, layer] = plans[part.position].mean(hidden[layer])
            return torch.stack([pooled[part.position, layer] for layer in part.layers], dim=1)

        if isinstance(request, Projections):
            scores = [_projected(pooled_BLd(part), part) for part in request.parts]
            return {request.column: torch.cat(scores, dim=1)}
        if isinstance(request, Project):
            return {"activation_scores": _projected(pooled_BLd(request), request)}
        return {"activation_pooled": pooled_BLd(request).flatten(1)}


def _projected(pooled_BLd: Tensor, part: Project) -> Tensor:
    return project(pooled_BLd, part.vectors_DLd.to(pooled_BLd.device))
