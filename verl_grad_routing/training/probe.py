"""Reads the residual stream in a pass that verl runs anyway, and returns one row per rollout.

Requests, carried by the batch as the non-tensor ``probe``:
``Pool(layers)`` returns the pooled activations themselves, for the contrastive pairs; ``Project(layers, vectors_DLd)``
returns their projections, for the rollouts of a step, and ``Projections`` those of several detectors at once;
``AdjacentCosines(layers)`` says how much each layer turns them.
With a ``bottleneck`` a ``Pool`` or ``Project`` reads its coordinates ``A x``: L is then its modules and d its rank.
Shapes: B rollouts, L layers, D directions, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """Return ``activation_scores`` [B, D]: the pooled activations projected on D directions.

    With ``tokens`` (``projection`` or ``cosine``) also ``activation_scores_tokens``, jagged [B, (R)]: every response
    token's own activation on the first direction. With ``features`` also ``activation_scores_features_{i}``,
    [B, L * d]: the pooled activations themselves, i being the place among the projections.
    """

    layers: tuple[int, ...]
    vectors_DLd: Tensor
    position: str = "resp_mean"
    bottleneck: Bottleneck | None = None
    tokens: str | None = None
    features: bool = False


@dataclass(frozen=True, eq=False)
class Projections:
    """Return ``column`` [B, D1 + D2 + ...]: what each ``Project`` asks for, side by side.

    Layers and positions may differ; each is read once. The numbers of a part are those that it gets alone, bit for bit.
    One of them at most may ask for ``tokens``, which are ``{column}_tokens`` then.
    """

    parts: tuple[Project, ...]
    column: str = "activation_scores"


@dataclass(frozen=True)
class AdjacentCosines:
    """Return ``activation_pooled`` [B, L]: mean over tokens of the cosine between each layer's input and output."""

    layers: tuple[int, ...]
    position: str = "resp_mean"


Part = Pool | Project | AdjacentCosines
Request = Part | Projections
Heard = int | tuple[Bottleneck, str]
"""What is listened to: a layer's output by the layer's number, or the coordinates of a bottleneck's module by name."""


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
        self._wanted: frozenset[int] = frozenset()  # layers whose output is kept
        self._hidden: dict[Heard, Tensor] = {}
        self._on_modules: list[Any] = []  # hooks that bottlenecks need, while they are read
        for index, layer in enumerate(self.layers, start=1):
            layer.register_forward_hook(self._hook(index), with_kwargs=True)

    def _hook(self, index: int) -> Callable:
        def keep(_module: nn.Module, inputs: tuple, named: dict, output: Tensor | tuple) -> None:
            if index not in self._wanted:
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
        return tuple(dict.fromkeys(part.position for part in self._parts))

    @property
    def _parts(self) -> tuple[Part, ...]:
        if self._request is None:
            return ()
        return self._request.parts if isinstance(self._request, Projections) else (self._request,)

    def begin(self, request: Request | None) -> None:
        """Start listening for ``request`` (or stop). Raises ``UserError`` for a layer that the model has not."""
        self._release()
        self._request = request
        bottlenecks = dict.fromkeys(_bottleneck(part) for part in self._parts)
        for bottleneck in bottlenecks:
            if bottleneck is not None:
                self._listen(bottleneck)
        self._wanted = frozenset(x for part in self._parts if _bottleneck(part) is None for x in part.layers)
        for layer in sorted(self._wanted):
            if not 1 <= layer <= len(self.layers):
                fix = f"the model has layers 1 to {len(self.layers)}"
                raise UserError("grad_routing.detector.layers", layer, fix)

    def _listen(self, bottleneck: Bottleneck) -> None:
        """Hooks that keep ``A x`` of every module of ``bottleneck``."""
        bases = self.bases.of(bottleneck)

        def keep(name: str) -> Callable:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
                x = inputs[0].detach()
                self._hidden[bottleneck, name] = x @ bases[name].read_rI.to(x).t()

            return hook

        modules = probed_modules(self.layers, bottleneck)
        self._on_modules += [module.register_forward_hook(keep(name)) for name, module in modules.items()]

    def _release(self) -> None:
        self._hidden.clear()
        self._wanted = frozenset()
        for handle in self._on_modules:
            handle.remove()
        self._on_modules = []

    def _heard(self, part: Part) -> list[Heard]:
        """What ``part`` pools, in its order."""
        bottleneck = _bottleneck(part)
        return list(part.layers) if bottleneck is None else [(bottleneck, name) for name in self.bases.of(bottleneck)]

    def finish(
        self,
        plans: Mapping[str, PoolPlan],
        flatten: Callable[[Tensor], Tensor],
        by_response: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Pool what was heard.

        Args:
            plans: For each position, which tokens belong to which rollout.
            flatten: Turns a layer's output into hidden states ``[N, d]`` in the order of the plans' tokens.
            by_response: Turns numbers ``[N]`` in that order into those of the response tokens, jagged [B, (R)]; needed
                where a request asks for ``tokens``.
        """
        request = self._request
        assert request is not None
        hidden = {heard: flatten(tensor) for heard, tensor in self._hidden.items()}
        self._release()
        pooled: dict[tuple[str, Heard], Tensor] = {}

        def pooled_BLd(part: Part) -> Tensor:
            rows = self._heard(part)
            for heard in rows:
                if (part.position, heard) not in pooled:
                    pooled[part.position, heard] = plans[part.position].mean(hidden[heard])
            return torch.stack([pooled[part.position, heard] for heard in rows], dim=1)

        if isinstance(request, Pool | AdjacentCosines):
            return {"activation_pooled": pooled_BLd(request).flatten(1)}
        projections = request if isinstance(request, Projections) else Projections((request,))
        scores = [_projected(pooled_BLd(part), part) for part in projections.parts]
        found = {projections.column: torch.cat(scores, dim=1)}
        for place, part in enumerate(projections.parts):
            if part.features:
                found[f"{projections.column}_features_{place}"] = pooled_BLd(part).flatten(1)
            if part.tokens is not None:
                assert by_response is not None
                scores_N = _token_scores([hidden[heard] for heard in self._heard(part)], part)
                found[f"{projections.column}_tokens"] = by_response(scores_N)
        return found


def _bottleneck(part: Part) -> Bottleneck | None:
    return None if isinstance(part, AdjacentCosines) else part.bottleneck


def _token_scores(hidden_LNd: list[Tensor], part: Project) -> Tensor:
    """Mean over layers of ``<h, v>`` of every position with the first direction, float64 [N]; a row for itself."""
    total_N = torch.zeros(len(hidden_LNd[0]), dtype=torch.float64, device=hidden_LNd[0].device)
    for hidden_Nd, vector_d in zip(hidden_LNd, part.vectors_DLd[0].to(total_N.device), strict=True):
        exact_Nd = hidden_Nd if hidden_Nd.dtype == torch.float64 else hidden_Nd.float()
        score_N = (exact_Nd * vector_d.to(exact_Nd)).sum(1)
        if part.tokens == "cosine":
            score_N = score_N / (exact_Nd.norm(dim=1) * vector_d.to(exact_Nd).norm()).clamp(min=1e-30)
        total_N += score_N.double()
    return total_N / len(hidden_LNd)


def _projected(pooled_BLd: Tensor, part: Project) -> Tensor:
    return project(pooled_BLd, part.vectors_DLd.to(pooled_BLd.device))
