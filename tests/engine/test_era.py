"""Expand-Route-Ablate in verl's FSDP2 engine, on one and two ranks: float64 gradients, dead padding, contraction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.engine.dense_reference import ON, Adam, DenseReference
from tests.engine.rollouts import KEEP, ROUTE, routed
from verl_grad_routing.deploy import export

pytestmark = pytest.mark.timeout(600)

OLD, NEW = 96, 10  # units of the engine tests' model, and what scenarios_era adds to layers 0 and 2
MASKS = {0: (ON, ON, (1, 0.5)), 1: (ON, ON, (1, 0.5)), 2: (ON, ON, (-0.75, 1))}


def entries(name: str, shape: torch.Size, layers: tuple[int, ...]) -> Tensor:
    """1 at the rows and columns behind the old ones in the MLPs of these layers."""
    flags = torch.zeros(shape, dtype=torch.float64)
    if any(f"layers.{layer}.mlp." in name for layer in layers) and not name.endswith("down_proj.bias"):
        flags.narrow(int("down_proj" in name), OLD, NEW).fill_(1)
    return flags


class EraReference(DenseReference):
    def __init__(self, model_dir):
        super().__init__(model_dir)
        self.flags = {name: entries(name, value.shape, (0, 2)) for name, value in self.values.items()}


@pytest.mark.parametrize("how", ["gradients", "gradients, checkpointed"])
def test_gradients_are_clouds_on_old_and_new_units(how, world, inputs):
    found = world["era"]
    expected = EraReference(found["model"]).gradients(inputs.rollouts, table=MASKS)
    assert found[how].keys() == expected.keys()
    for name, value in expected.items():
        error = (found[how][name].double() - value).norm() / value.norm().clamp(min=1e-3)
        assert error < 1e-5, name


def test_steps_are_adam_of_each_block_and_padding_stays_exactly_zero(world, inputs):
    found = world["era"]
    assert found["held"] == ["deployed", "quarantine"]
    own = EraReference(found["model"])
    adam = Adam(own, lr=1e-2, decay=0.1, clip=1.0)
    for index, kind in enumerate((None, ROUTE, KEEP)):
        rows = inputs.rollouts if kind is None else routed(inputs.rollouts, kind)
        norms = adam.step(own.gradients(rows, table=MASKS), (True, True))
        for block, norm in zip(("deployed", "quarantine"), norms, strict=True):
            assert found["metrics"][index][f"routing/grad_norm/{block}"] == pytest.approx(norm, rel=1e-3)
        for name, value in own.values.items():
            # Adam divides by the gradient's own size, so rounding is large where gradients are tiny
            off = (found["values"][index + 1][name].double() - value).abs() > 2e-4
            assert off.float().mean() < 0.01, (index, name)
    for values in found["values"]:
        for name, value in values.items():
            assert not value[entries(name, value.shape, (1,)) == 1].any(), name
    first, last = found["values"][0], found["values"][-1]
    for name, value in first.items():
        new = entries(name, value.shape, (0, 2)) == 1
        assert not new.any() or not torch.equal(value[new], last[name][new]), name


def test_what_is_exported_is_the_ablated_engine_at_the_original_size(world, inputs, tmp_path):
    found = world["era"]
    done = export(found["checkpoint"], tmp_path / "out", "hf")
    assert done.difference.maximum < 1e-4 and done.quarantine_effect > 0.1
    model = LlamaForCausalLM.from_pretrained(done.folder)
    assert model.config.intermediate_size == OLD
    for name, value in model.state_dict().items():
        whole = found["values"][-1][name]
        assert torch.equal(value, whole[tuple(slice(size) for size in value.shape)]), name
    for row, have in zip(inputs.rollouts, found["log_probs"], strict=True):
        with torch.no_grad():
            logits = model(row.tokens[None]).logits[0, len(row.prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, row.response[:, None]).squeeze(-1)
        assert (expected - have).abs().max() < 2e-5
