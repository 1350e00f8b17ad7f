"""Hooked per-rollout gradients against PEFT's own, streams and sketches against their definitions."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from tests.tiny import lively_llama
from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import (
    Fingerprints,
    GradientProbe,
    GradientTaps,
    packed_spans,
    padded_spans,
    per_sample_gradients,
    probed_modules,
    sketch,
    smallest_cosine_layers,
    streams,
)

PROBE = GradientProbe(layers=(1, 3), targets=("q_proj", "o_proj", "down_proj"), rank=4, alpha=12.0, dim=96, seed=5)
LENGTHS = [7, 3, 9, 5]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return lively_llama(**sizes, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 31, (length,), generator=generator) for length in LENGTHS]


def nll(logits_SV: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the first two, which are the prompt."""
    log_probs = logits_SV[1 : len(row) - 1].log_softmax(-1)
    return -log_probs.gather(1, row[2:, None]).sum()


def padded_pass(model: nn.Module, rows: list[torch.Tensor], consume, scale: float = 1.0) -> None:
    width = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    with GradientTaps(probed_modules(list(model.model.layers), PROBE), consume) as taps:  # type: ignore[union-attr]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        taps.backward(scale * torch.stack([nll(own, row) for own, row in zip(logits, rows, strict=True)]).sum())


def hooked(model: nn.Module, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every module's per-rollout gradients [B, d_out, r] of one padded batch."""
    spans, found = padded_spans([len(row) for row in rows], max(map(len, rows))), {}

    def keep(name: str, x_NI: torch.Tensor, delta_NO: torch.Tensor) -> None:
        A = PROBE.down_projection(name, x_NI.shape[1])
        found[name] = per_sample_gradients(x_NI, delta_NO, A, spans, PROBE.scaling)

    padded_pass(model, rows, keep)
    return found


def peft_gradients(model: LlamaForCausalLM, row: torch.Tensor) -> dict[str, torch.Tensor]:
    """``lora_B.grad`` at batch size 1, the same A put into PEFT's adapter."""
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=list(PROBE.targets), bias="none")
    config.layers_to_transform = [layer - 1 for layer in PROBE.layers]
    peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    try:
        modules = probed_modules(list(model.model.layers), PROBE)
        with torch.no_grad():
            for name, module in modules.items():
                module.lora_A["default"].weight.copy_(PROBE.down_projection(name, module.in_features))
        nll(peft(input_ids=row[None], use_cache=False).logits[0], row).backward()
        found = {name: module.lora_B["default"].weight.grad.clone() for name, module in modules.items()}
        assert all(not module.lora_A["default"].weight.grad.any() for module in modules.values())
        return found
    finally:
        peft.unload()
        model.requires_grad_(True)
        model.zero_grad()


def test_gradients_of_a_batch_are_pefts_of_single_rollouts(model, rows):
    found = hooked(model, rows)
    assert len(found) == 6
    for index, row in enumerate(rows):
        expected = peft_gradients(model, row)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-3
            torch.testing.assert_close(found[name][index], gradient, rtol=1e-9, atol=1e-12)


def fingerprints(model, rows, scale: float = 1.0) -> torch.Tensor:
    consumer = Fingerprints(PROBE, padded_spans([len(row) for row in rows], max(map(len, rows))))
    padded_pass(model, rows, consumer, scale)
    return consumer.normalised_BF


def test_a_batchs_fingerprints_are_those_of_its_rollouts_alone(model, rows):
    together = fingerprints(model, rows)
    assert together.shape == (4, 96)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4, dtype=torch.float64))
    alone = torch.cat([fingerprints(model, [row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fingerprints(model, rows[::-1]), together.flip(0), rtol=1e-9, atol=1e-12)
    assert (together @ together.T - torch.eye(4)).abs().max() < 0.9  # and they differ


def test_the_scale_of_the_loss_does_not_matter(model, rows):
    """So a mean over tokens, as in the paper's code, gives the fingerprints of a sum."""
    for scale in (1e-3, 7.0):
        torch.testing.assert_close(fingerprints(model, rows, scale), fingerprints(model, rows), rtol=0, atol=1e-6)


def test_the_pass_leaves_the_model_as_it_was(model, rows):
    hooked(model, rows)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    model.requires_grad_(False)  # nothing needs to be trainable
    try:
        assert hooked(model, rows)["1.self_attn.q_proj"].abs().max() > 1e-3
    finally:
        model.requires_grad_(True)


def test_the_backward_pass_ends_at_the_earliest_tapped_layer(model, rows):
    reached = []

    def watch(layer: int):
        def hook(_module, _inputs, output):
            output.register_hook(lambda _gradient: reached.append(layer))

        return hook

    handles = [layer.register_forward_hook(watch(n)) for n, layer in enumerate([model.model.embed_tokens], start=0)]
    handles += [layer.register_forward_hook(watch(n)) for n, layer in enumerate(model.model.layers, start=1)]
    hooked(model, rows)
    for handle in handles:
        handle.remove()
    assert reached == [3, 2, 1]


def test_activation_checkpointing_changes_nothing(model, rows):
    plain = hooked(model, rows)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    try:
        again = hooked(model, rows)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-12, atol=1e-14)


def test_packed_spans_leave_filling_out():
    assert packed_spans([3, 1, 2]) == [(0, 3), (3, 4), (4, 6)]
    assert padded_spans([3, 1], 4) == [(0, 3), (4, 5)]
    x, delta = torch.randn(8, 3), torch.randn(8, 2)
    A = torch.randn(2, 3)
    found = per_sample_gradients(x, delta, A, packed_spans([3, 1, 2]), 0.5)
    torch.testing.assert_close(found[1], 0.5 * delta[3:4].T @ (x[3:4] @ A.T))
    assert found.shape == (3, 2, 2)


def test_low_precision_inputs_give_float32_gradients():
    x, delta = torch.full((4, 2), 1e-4).bfloat16(), torch.full((4, 3), 1e-5).bfloat16()
    found = per_sample_gradients(x, delta, torch.ones(1, 2), [(0, 4)], 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((1, 3, 1), 8e-9), rtol=1e-2, atol=0)  # nothing in float16


# ---- streams and sketches ----


def test_splitmix64_reference_values():
    """The first words for seed 1234567, from the algorithm's public reference output."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [word % 2**64 for word in streams.words(1234567, 0, 4).tolist()] == expected
    assert torch.equal(streams.words(1234567, 2, 2), streams.words(1234567, 0, 4)[2:])


def test_signs_do_not_depend_on_the_block():
    whole = streams.signs(9, 0, 50, 70)
    assert whole.shape == (50, 70) and set(whole.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(streams.signs(9, 20, 7, 70), whole[20:27])
    assert not torch.equal(streams.signs(10, 0, 50, 70), whole)
    big = streams.signs(1, 0, 4000, 64)
    assert big.mean().abs() < 0.01 and (big.T @ big / 4000 - torch.eye(64)).abs().max() < 0.08


def test_a_sketch_is_the_dense_product_whatever_the_block():
    g = torch.randn(3, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = g @ streams.signs(7, 0, 100, 32).double() / 32**0.5
    for block in (1, 32 * 7, 1 << 20):
        torch.testing.assert_close(sketch(g, 7, 32, block), dense, rtol=1e-12, atol=1e-12)


def test_sketches_keep_inner_products():
    g = torch.nn.functional.normalize(torch.randn(6, 3000, generator=torch.Generator().manual_seed(0)), dim=1)
    g = torch.cat((g, 0.8 * g[:1] + 0.6 * g[1:2]))
    assert (sketch(g, 3, 4096) @ sketch(g, 3, 4096).T - g @ g.T).abs().max() < 0.08


def test_a_probe_is_its_seed():
    a, b = PROBE.down_projection("1.x", 64), PROBE.down_projection("1.x", 64)
    assert torch.equal(a, b) and a.shape == (4, 64) and a.abs().max() <= 0.125 and a.abs().max() > 0.11
    assert not torch.equal(a, PROBE.down_projection("2.x", 64))
    other = GradientProbe(**{**vars(PROBE), "seed": 6})
    assert not torch.equal(a, other.down_projection("1.x", 64)) and PROBE.hash != other.hash
    assert PROBE.hash == GradientProbe(**vars(PROBE)).hash


def test_layers_and_targets_that_do_not_exist_are_refused(model):
    layers = list(model.model.layers)
    with pytest.raises(UserError, match=r"layers=4: the model has layers 1 to 3"):
        probed_modules(layers, GradientProbe(layers=(4,)))
    with pytest.raises(UserError, match=r"targets=\['qkv'\]: layer 1 has .*q_proj"):
        probed_modules(layers, GradientProbe(layers=(1,), targets=("qkv",)))


def test_layers_with_the_smallest_cosines():
    cosines = torch.tensor([[0.9, 0.5, 0.7, 0.5, 0.2], [0.9, 0.7, 0.9, 0.7, 0.8]])  # means .9 .6 .8 .6 .5
    assert smallest_cosine_layers(cosines, 2) == (2, 5)
    assert smallest_cosine_layers(cosines, 3) == (2, 4, 5)
    with pytest.raises(UserError, match="num_layers=6"):
        smallest_cosine_layers(cosines, 6)
