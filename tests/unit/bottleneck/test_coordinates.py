"""Bottleneck gradients against PEFT's own and against autograd through a gate, one rollout at a time."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from tests.tiny import lively_llama
from verl_grad_routing.bottleneck import (
    Bottleneck,
    KeptCoordinates,
    ModuleBasis,
    ProjectedCoordinates,
    bases_of,
    bottleneck_gradients,
    cosines,
    digest,
)
from verl_grad_routing.directions import project
from verl_grad_routing.errors import UserError
from verl_grad_routing.fingerprints import GradientTaps, packed_spans, padded_spans, probed_modules

TARGETS = ("q_proj", "o_proj", "down_proj")
RANK = 4
SVD = Bottleneck((1, 3), TARGETS, RANK, "svd")
LORA = Bottleneck((1, 3), TARGETS, RANK, "lora", seed=7)
LENGTHS = [7, 3, 9, 5]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return lively_llama(**sizes, num_attention_heads=4, num_key_value_heads=2).requires_grad_(False)


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 31, (length,), generator=generator) for length in LENGTHS]


def mean_nll(logits_SV: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the first two, which are the prompt."""
    log_probs = logits_SV[1 : len(row) - 1].log_softmax(-1)
    return -log_probs.gather(1, row[2:, None]).mean()


def layers(model: LlamaForCausalLM) -> list[nn.Module]:
    return list(model.model.layers)


def bases(model: LlamaForCausalLM, bottleneck: Bottleneck) -> dict[str, ModuleBasis]:
    """In float64, so that comparisons can be."""
    made = bases_of(layers(model), bottleneck)
    return {name: ModuleBasis(*(side.double() for side in basis)) for name, basis in made.items()}


def together(model, rows, bottleneck, consumer_of):
    """One padded batch of all rows through a consumer."""
    width = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    consumer = consumer_of(padded_spans([len(row) for row in rows], width))
    with GradientTaps(probed_modules(layers(model), bottleneck), consumer) as taps:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        taps.backward(torch.stack([mean_nll(own, row) for own, row in zip(logits, rows, strict=True)]).sum())
    return consumer.rows


def by_gate(model, row, bottleneck) -> torch.Tensor:
    """From the definition: autograd's gradient of c at 0 in ``y = W x + B (c ⊙ A x)``, one rollout alone, [M, r]."""
    made, gates, handles = bases(model, bottleneck), {}, []

    def gated(name: str):
        gates[name] = torch.zeros(RANK, dtype=torch.float64, requires_grad=True)

        def hook(_module, inputs, output):
            return output + (gates[name] * (inputs[0] @ made[name].read_rI.t())) @ made[name].write_Or.t()

        return hook

    for name, module in probed_modules(layers(model), bottleneck).items():
        handles.append(module.register_forward_hook(gated(name)))
    loss = mean_nll(model(input_ids=row[None], use_cache=False).logits[0], row)
    for handle in handles:
        handle.remove()
    return torch.stack(torch.autograd.grad(loss, list(gates.values())))


@pytest.mark.parametrize("bottleneck", [SVD, LORA], ids=["svd", "lora"])
def test_a_batch_gives_every_rollout_its_own_gradient(model, rows, bottleneck):
    made = bases(model, bottleneck)
    found = together(model, rows, bottleneck, lambda spans: KeptCoordinates(made, spans))
    assert found.shape == (4, 6 * RANK) and found.dtype == torch.float64
    for have, row in zip(found, rows, strict=True):
        want = by_gate(model, row, bottleneck)
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(have.view(6, RANK), want, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_pefts_adapter(model, rows):
    """Row sums of A ⊙ dA, and column sums of B ⊙ dB, of a PEFT adapter with these weights at batch size 1.

    The adapter is switched on, so the base model here is the one with it: both sides see the same x and delta.
    """
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), layers_to_transform=[0, 2])
    drawn = bases(model, LORA)
    peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    try:
        modules = probed_modules(layers(model), LORA)
        with torch.no_grad():
            for name, module in modules.items():
                module.lora_A["default"].weight.copy_(drawn[name].read_rI)
                module.lora_B["default"].weight.copy_(drawn[name].write_Or)
        found = together(model, rows, LORA, lambda spans: KeptCoordinates(drawn, spans)).view(4, 6, RANK)
        for have, row in zip(found, rows, strict=True):
            peft.zero_grad()
            mean_nll(peft(input_ids=row[None], use_cache=False).logits[0], row).backward()
            for number, module in enumerate(modules.values()):
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
                torch.testing.assert_close(have[number], (A * A.grad).sum(1), rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(have[number], (B * B.grad).sum(0), rtol=1e-9, atol=1e-12)
    finally:
        peft.unload()
        model.requires_grad_(False)


def test_svd_coordinates_are_gradients_of_singular_values(model, rows):
    """d loss / d c of W + U diag(c) Vᵀ, by a finite difference of the weight."""
    made = bases(model, SVD)
    have = together(model, rows[:1], SVD, lambda spans: KeptCoordinates(made, spans)).view(6, RANK)
    name, step, row = "3.self_attn.o_proj", 1e-3, rows[0]  # Llama's norms are float32 whatever the model is
    module, number = probed_modules(layers(model), SVD)[name], list(made).index(name)
    U, V = made[name].write_Or[:, 1], made[name].read_rI[1]
    torch.testing.assert_close(module.weight @ V / (module.weight @ V).norm(), U, rtol=1e-5, atol=1e-6)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            module.weight += sign * step * torch.outer(U, V)
            values.append(mean_nll(model(input_ids=row[None]).logits[0], row))
            module.weight -= sign * step * torch.outer(U, V)
    assert float(values[0] - values[1]) / (2 * step) == pytest.approx(float(have[number, 1]), rel=3e-3)


def test_neighbours_and_their_order_do_not_matter(model, rows):
    made = bases(model, SVD)

    def found(chosen):
        return together(model, chosen, SVD, lambda spans: KeptCoordinates(made, spans))

    every = found(rows)
    torch.testing.assert_close(every, torch.cat([found([row]) for row in rows]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found(rows[::-1]), every.flip(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cosine", [False, True])
def test_projecting_in_the_hook_is_projecting_afterwards(model, rows, cosine):
    made = bases(model, SVD)
    vectors = torch.randn(3, 6, RANK, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept = together(model, rows, SVD, lambda spans: KeptCoordinates(made, spans)).view(4, 6, RANK)
    scores = together(model, rows, SVD, lambda spans: ProjectedCoordinates(made, spans, vectors, cosine))
    assert scores.shape == (4, 3)
    torch.testing.assert_close(scores, cosines(kept, vectors) if cosine else project(kept, vectors))
    by_hand = (kept[1] * vectors[2]).sum() / (kept[1].norm() * vectors[2].norm() if cosine else 6)
    assert float(scores[1, 2]) == pytest.approx(float(by_hand), rel=1e-10)


def test_a_rollout_without_a_gradient_scores_zero():
    made = {"m": ModuleBasis(torch.ones(1, 2), torch.ones(3, 1))}
    consumer = ProjectedCoordinates(made, [(0, 2), (2, 4)], torch.ones(1, 1, 1), cosine=True)
    delta = torch.ones(4, 3)
    delta[2:] = 0
    consumer("m", torch.ones(4, 2), delta)
    assert consumer.rows.tolist() == [[1.0], [0.0]]


def test_by_hand():
    """Two tokens of one rollout, a filling token: f = Σ (A x) ⊙ (Bᵀ delta)."""
    basis = ModuleBasis(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([[1.0, -1.0]]))
    x, delta = torch.tensor([[1.0, 2.0], [0.0, 1.0], [9.0, 9.0]]), torch.tensor([[3.0], [1.0], [9.0]])
    # A x: (1, 5), (0, 2); Bᵀ delta: (3, -3), (1, -1)
    assert bottleneck_gradients(x, delta, basis, packed_spans([2])).tolist() == [[3.0, -17.0]]


def test_low_precision_inputs_are_summed_in_float32():
    basis = ModuleBasis(torch.ones(1, 1), torch.ones(1, 1))
    x, delta = torch.ones(4096, 1).bfloat16(), torch.full((4096, 1), 2.0**-10).bfloat16()
    found = bottleneck_gradients(x, delta, basis, [(0, 4096)])
    assert found.dtype == torch.float32 and found.item() == 4.0  # bfloat16 sums stop growing at 0.25


def test_a_drawn_basis_is_its_seed_and_name(model):
    one, same, other = (bases_of(layers(model), Bottleneck((1, 3), TARGETS, 4, "lora", seed)) for seed in (7, 7, 8))
    assert all(torch.equal(one[name].read_rI, same[name].read_rI) for name in one)
    assert not torch.equal(one["1.self_attn.q_proj"].read_rI, one["3.self_attn.q_proj"].read_rI)
    assert not torch.equal(one["1.self_attn.q_proj"].read_rI, other["1.self_attn.q_proj"].read_rI)
    wide = bases_of([nn.Sequential()] and [nn.ModuleDict({"q_proj": nn.Linear(400, 300)})], LORA_WIDE)["1.q_proj"]
    assert wide.read_rI.var() * 400 == pytest.approx(1, rel=0.05)
    assert wide.write_Or.var() * 2 * 64 == pytest.approx(1, rel=0.05)


LORA_WIDE = Bottleneck((1,), ("q_proj",), 64, "lora")


def test_digests_tell_weights_apart_and_not_signs(model):
    made = bases_of(layers(model), SVD)
    flipped = {name: ModuleBasis(-basis.read_rI, -basis.write_Or) for name, basis in made.items()}
    torch.testing.assert_close(digest(made), digest(flipped))
    assert len(digest(made)) == 6
    weight = probed_modules(layers(model), SVD)["1.mlp.down_proj"].weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        changed = digest(bases_of(layers(model), SVD))
        weight -= 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (changed != digest(made)).tolist() == [name == "1.mlp.down_proj" for name in made]


def test_bad_places_are_refused(model):
    with pytest.raises(UserError, match=r"detector.rank=17: 1.self_attn.k_proj is 16 x 32; give at most 16"):
        bases_of(layers(model), Bottleneck((1,), ("k_proj",), 17, "svd"))
    with pytest.raises(UserError, match=r"targets=\['qkv'\]: layer 1 has .*q_proj"):
        bases_of(layers(model), Bottleneck((1,), ("qkv",), 2, "svd"))
    with pytest.raises(UserError, match=r"layers=4: the model has layers 1 to 3"):
        bases_of(layers(model), Bottleneck((4,), TARGETS, 2, "svd"))
