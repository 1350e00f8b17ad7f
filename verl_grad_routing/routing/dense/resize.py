"""Weights of a model with more MLP units, and back: new rows and columns behind the old ones, which stay as they are.

Shapes: ``I`` units before, ``N`` new ones, ``d`` the model's width; gate and up are ``[I, d]``, down is ``[d, I]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_grad_routing.routing.dense.expansion import Expansion, unit_dim


def widened(name: str, tensor: Tensor, expansion: Expansion, generator: torch.Generator) -> Tensor:
    """The parameter ``name`` of the expanded model: ``tensor`` itself where it has no units along a dimension.

    New units start with normal rows of gate and up, and with columns of down that are zero (the model computes what it
    did) or normal too (as Cloud et al. initialise them). The standard deviation is ``expansion.std``, or the root mean
    square of the matrix they are added to, so that a new unit looks like an old one. Biases and padding are zero.

    Args:
        generator: On the CPU; draws are float32 and rounded to the tensor's dtype.
    """
    found = unit_dim(name)
    if found is None:
        return tensor
    layer, dim = found
    shape = list(tensor.shape)
    shape[dim] = expansion.units
    drawn = tensor.ndim == 2 and layer in expansion.layers and (dim == 0 or expansion.out_side == "random")
    if drawn:
        std = expansion.std if expansion.std is not None else float(tensor.float().square().mean().sqrt())
        new = (torch.randn(shape, generator=generator) * std).to(tensor.dtype)
    else:
        new = torch.zeros(shape, dtype=tensor.dtype)
    return torch.cat([tensor, new.to(tensor.device)], dim=dim)


def narrowed(name: str, tensor: Tensor, expansion: Expansion) -> Tensor:
    """The parameter ``name`` with its first ``expansion.original`` units alone; ``tensor`` itself where it has none."""
    found = unit_dim(name)
    return tensor if found is None else tensor.narrow(found[1], 0, expansion.original).contiguous()
