"""Both blocks inside a plain Hugging Face decoder: the same modules, names and parameters, another forward.

Every module that owns parameters gets a class of ours in place of its own. Its parameters stay the very same objects
under the very same names, so checkpoints, weight tying, sharding and rollout engines see an ordinary model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing.dense.kernel import (
    Side,
    TokenSets,
    scaled_gradient,
    token_weight,
    unit_linear,
    updates_within,
)
from verl_grad_routing.routing.dense.units import DenseBlocks, Role
from verl_grad_routing.routing.install import RoutingContext

_FUSED_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class DenseContext(RoutingContext):
    """The masks of the tokens in flight, see :class:`RoutingContext` for how long they stay.

    Attributes:
        activation_gradient: ``[..., T, 2]`` factors on the gradient of units' outputs; ``None`` is 1 everywhere.
        shared_mask: ``[..., T, 2]``, both columns alike: which tokens train the parameters of neither block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.activation_gradient: Tensor | None = None
        self.shared_mask: Tensor | None = None
        self._gates_quarantine_alone = False
        self._within: dict[bool, bool] = {}
        self._sets: TokenSets | None = None
        self._shared_sets: TokenSets | None = None

    def set_all(
        self,
        forward_gate: Tensor | None,
        update_mask: Tensor | None,
        activation_gradient: Tensor | None = None,
        shared_mask: Tensor | None = None,
    ) -> None:
        """Masks of the next forward pass and of the backward pass that belongs to it; ones everywhere are none."""
        super().set(_unless_ones(forward_gate), _unless_ones(update_mask))
        self.activation_gradient, self.shared_mask = _unless_ones(activation_gradient), _unless_ones(shared_mask)
        gate = self.forward_gate
        self._gates_quarantine_alone = gate is not None and bool((gate[..., 0] == 1).all())
        masks = {False: self.update_mask, True: self.shared_mask}
        self._within = {shared: updates_within(gate, mask) for shared, mask in masks.items()}
        self._sets, self._shared_sets = TokenSets.of(self.update_mask), TokenSets.of(self.shared_mask)

    def set(self, forward_gate: Tensor | None, update_mask: Tensor | None) -> None:
        self.set_all(forward_gate, update_mask)

    def update_of(self, role: Role | None) -> Tensor | None:
        """The update mask of a parameter with that role."""
        if self.ablated or role is None:
            return None
        return self.shared_mask if role.shared else self.update_mask

    def sets_of(self, role: Role) -> TokenSets | None:
        """The tokens that :meth:`update_of` names, where it is of zeros and ones."""
        return self._shared_sets if role.shared else self._sets

    def updates_within_gate(self, role: Role) -> bool:
        """Whether :meth:`update_of` is 0 wherever :meth:`gate` is not 1."""
        return not self.ablated and self._within.get(role.shared, False)

    def gate(self, like: Tensor) -> Tensor | None:
        """Forward gate; an ablated model has no quarantine whatever the masks say."""
        if self.ablated:
            return torch.tensor([1.0, 0.0], device=like.device).expand(*(1,) * (like.ndim - 1), 2)
        return self.forward_gate

    @property
    def gates_quarantine_alone(self) -> bool:
        """Whether :meth:`gate` is 1 for the deployed block of every token."""
        return self.ablated or self._gates_quarantine_alone


def _unless_ones(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or (mask == 1).all() else mask


class _Dense:
    """What every installed module has."""

    context: DenseContext
    weight_role: Role
    bias_role: Role | None
    unit_weights: Tensor | None = None


class DenseLinear(_Dense, nn.Linear):
    """``nn.Linear`` by :func:`unit_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        context, role = self.context, self.weight_role
        side: Side = "none" if role.dim is None else ("rows", "columns")[role.dim]
        units = side == "columns"
        return unit_linear(
            input,
            self.weight,
            self.bias,
            side=side,
            ranges=role.ranges,
            update_mask=context.update_of(role),
            token_sets=context.sets_of(role),
            bias_mask=context.update_of(self.bias_role),
            forward_gate=context.gate(input) if units else None,
            gates_quarantine_alone=context.gates_quarantine_alone,
            updates_within_gate=context.updates_within_gate(role),
            activation_gradient=context.activation_gradient if units and not context.ablated else None,
            unit_weights=self._weights_beside(input) if units else None,
        )

    def _weights_beside(self, input: Tensor) -> Tensor | None:
        if self.unit_weights is not None and self.unit_weights.device != input.device:
            self.unit_weights = self.unit_weights.to(input.device)
        return self.unit_weights


class DenseEmbedding(_Dense, nn.Embedding):
    """``nn.Embedding``; tokens whose mask is 0 leave their row's gradient alone."""

    def forward(self, input: Tensor) -> Tensor:
        mask = self.context.update_of(self.weight_role)
        found = super().forward(input)
        return found if mask is None else scaled_gradient(found, mask[..., 0])


class DenseNorm(_Dense):
    """Mixed into a norm's own class, whose forward multiplies by its weight elementwise."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mask = self.context.update_of(self.weight_role)
        plain = super().forward  # type: ignore[misc]
        if mask is None:
            return plain(hidden_states)
        parameters = cast(nn.Module, self)._parameters
        weight = cast(nn.Parameter, parameters["weight"])
        try:  # as torch.func.functional_call swaps tensors, without calling the module's hooks again
            parameters["weight"] = cast(Any, token_weight(weight, mask[..., 0], hidden_states.ndim))
            return plain(hidden_states)
        finally:
            parameters["weight"] = weight


def install_blocks(model: nn.Module, blocks: DenseBlocks) -> DenseContext:
    """Route the gradients of all parameters of ``model`` by ``blocks``.

    Returns:
        The context that its modules share.

    Raises:
        UserError: A module that owns parameters is of a kind that cannot be routed (named).
    """
    context = DenseContext()
    for name, module in model.named_modules():
        own = [key for key, parameter in module._parameters.items() if parameter is not None]
        if own:
            roles = {key: blocks.role(f"{name}.{key}") for key in own}
            _adopt(module, name, roles, context)
            weights = blocks.weights_along(f"{name}.weight")
            if weights is not None:  # no buffer: models are made without memory first, and this is configuration
                cast(Any, module).unit_weights = torch.tensor(weights, dtype=torch.float64, device="cpu")
    return context


def _adopt(module: nn.Module, name: str, roles: dict[str, Role], context: DenseContext) -> None:
    kind = type(module)
    if kind is nn.Linear:
        adopted: type = DenseLinear
    elif kind is nn.Embedding:
        adopted = DenseEmbedding
        if cast(nn.Embedding, module).sparse:
            raise UserError(name, "sparse=True", "sparse embedding gradients cannot be masked by token")
    elif "norm" in name.rpartition(".")[2] and not isinstance(module, _FUSED_NORMS) and roles.keys() == {"weight"}:
        adopted = type(f"Dense{kind.__name__}", (DenseNorm, kind), {})
    else:
        fix = "dense blocks route torch.nn.Linear, torch.nn.Embedding and elementwise norms only"
        raise UserError(f"actor_rollout_ref.model.path ({name})", kind.__name__, fix)
    module.__class__ = adopted
    cast(Any, module).context, cast(Any, module).weight_role = context, roles["weight"]
    cast(Any, module).bias_role = roles.get("bias")


__all__ = ["DenseContext", "DenseEmbedding", "DenseLinear", "DenseNorm", "install_blocks"]
