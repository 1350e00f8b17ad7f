"""Blocks under FSDP2 (one process): sharded initialisation, freed and refilled parameters, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from verl_grad_routing.routing import add_blocks, block_masks, block_parameters, expand_to_padded, initialise_blocks


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def build(shard_on=None, policy: MixedPrecisionPolicy | None = None):
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2)))
    settings = {"deployed_rank": 2, "quarantine_rank": 3, "scaling": 1.0, "target_modules": r".*\.0"}
    model, context = add_blocks(layers, **settings)
    with torch.no_grad():
        for number, p in enumerate(p for block in block_parameters(model).values() for p in block):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    if shard_on is not None:
        options = {"mesh": shard_on, "mp_policy": policy or MixedPrecisionPolicy()}
        for layer in model.base_model.model:
            fully_shard(layer, reshard_after_forward=True, **options)
        fully_shard(model, **options)
    context.set(*(expand_to_padded(mask, 4) for mask in block_masks([0, 1, 2])))
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    x = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(9))
    model(x).sin().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def test_sharded_gradients_are_the_plain_ones(mesh):
    plain, sharded = gradients(build()), gradients(build(mesh))
    assert plain.keys() == sharded.keys() and all(torch.equal(plain[name], sharded[name]) for name in plain)


def test_mixed_precision_goes_through_the_kernel(mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plain, sharded = gradients(build()), gradients(build(mesh, policy))
    for name, want in plain.items():
        assert sharded[name].dtype == torch.float32
        assert (sharded[name] - want).abs().max() < 0.05 * want.abs().max() + 0.02


@pytest.mark.parametrize("init", ["random_orthogonal", "pissa_split"])
def test_sharded_initialisation_is_the_plain_one(mesh, init):
    plain, sharded = build(), build(mesh)
    for model in (plain, sharded):
        assert initialise_blocks(model, init, 3) == 2
    expected = dict(plain.named_parameters())
    for name, p in sharded.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.full_tensor(), expected[name])
