"""Blocks inside real models: PEFT's switches, the deployed model, and what is refused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import (
    RoutedLoraLinear,
    add_blocks,
    block_masks,
    block_parameters,
    deployed_only,
    expand_to_padded,
    join_blocks,
    joined_lora_config,
    routing_context,
)

IDS = torch.arange(12).reshape(2, 6)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, attention_bias=True)
    return LlamaForCausalLM(config).double()


def adapted(model: nn.Module | None = None, **overrides):
    settings = {"deployed_rank": 2, "quarantine_rank": 3, "scaling": 2 / 3, "target_modules": "all-linear"}
    model, context = add_blocks(llama() if model is None else model, **(settings | overrides))
    generator = torch.Generator().manual_seed(1)
    for parameters in block_parameters(model).values():
        for p in parameters:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
    return model, context


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def base_logits() -> torch.Tensor:
    return logits(llama())


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 14), (PROJECTIONS, 14), (["q_proj", "v_proj"], 4), (r".*layers\.1\..*(up|down)_proj", 2)],
    ids=["all-linear", "list", "two", "regex"],
)
def test_every_target_is_routed_and_everything_else_frozen(targets, count):
    model, context = adapted(target_modules=targets)
    routed = [m for m in model.modules() if isinstance(m, RoutedLoraLinear)]
    assert len(routed) == count and all(m.routing_context is context for m in routed)
    assert routing_context(model) is context
    blocks = block_parameters(model)
    assert [len(blocks[name]) for name in ("deployed", "quarantine")] == [2 * count, 2 * count]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for parameters in blocks.values() for p in parameters}
    sizes = [sum(p.numel() for p in blocks[name]) for name in ("deployed", "quarantine")]
    assert sizes[0] * 3 == sizes[1] * 2  # ranks 2 and 3


def test_exclusions_hold_for_both_blocks():
    model, _ = adapted(exclude_modules=["down_proj"])
    assert not any("down_proj" in n for n, p in model.named_parameters() if p.requires_grad)
    assert len(block_parameters(model)["quarantine"]) == 2 * 12


def test_starts_as_the_base_model_bit_for_bit(base_logits):
    settings = {"deployed_rank": 2, "quarantine_rank": 3, "scaling": 1.0, "target_modules": "all-linear"}
    assert torch.equal(logits(add_blocks(llama(), **settings)[0]), base_logits)


def test_forward_is_pefts_own_with_both_adapters():
    model, _ = adapted()
    reference, state = llama(), {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    peft_model = get_peft_model(reference, LoraConfig(**joined_lora_config(2, 3, 2 / 3), target_modules=PROJECTIONS))
    joined = join_blocks(state, adapter="default")
    missing = peft_model.load_state_dict(joined, strict=False)
    assert not missing.unexpected_keys
    assert (logits(model) - logits(peft_model)).abs().max() < 1e-12


def test_disable_adapter_is_the_bare_base(base_logits):
    model, context = adapted()
    context.set(torch.ones(99, 2), None)  # masks do not matter there
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    context.clear()
    assert not torch.equal(logits(model), base_logits)
    assert all(p.requires_grad for parameters in block_parameters(model).values() for p in parameters)


def test_ablated_is_the_deployed_block_alone():
    model, context = adapted()
    both = logits(model)
    context.set(torch.ones(99, 2), None)
    context.ablated = True
    ablated = logits(model)
    assert (both - ablated).abs().max() > 1e-3
    alone = get_peft_model(llama(), LoraConfig(**joined_lora_config(2, 0, 2 / 3), target_modules=PROJECTIONS))
    alone.load_state_dict(deployed_only(model.state_dict(), adapter="default"), strict=False)
    assert (ablated - logits(alone)).abs().max() < 1e-12
    context.clear()
    assert torch.equal(logits(model), both)
    model.base_model.set_adapter(["default"])
    assert torch.equal(logits(model), ablated)


def test_gates_equal_ablation_row_by_row():
    model, context = adapted()
    both = logits(model)
    context.ablated = True
    ablated = logits(model)
    context.ablated = False
    gate, update = (expand_to_padded(mask, IDS.shape[1]) for mask in block_masks([0, 2]))
    context.set(gate, update)
    mixed = logits(model)
    assert (mixed[0] - ablated[0]).abs().max() < 1e-12 and (mixed[1] - both[1]).abs().max() < 1e-12


def test_gradients_of_a_mixed_batch_are_the_sums_of_allowed_rollouts():
    """A whole transformer, with gradient checkpointing, against one rollout at a time without masks."""
    for checkpointing in (False, True):
        model, context = adapted()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        ids = torch.randint(0, 16, (3, 6), generator=torch.Generator().manual_seed(3))
        gate, update = (expand_to_padded(mask, 6) for mask in block_masks([0, 1, 2]))
        context.set(gate, update)
        model(ids).logits.sin().sum().backward()
        routed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.gradient_checkpointing_disable()
        expected = {name: torch.zeros_like(g) for name, g in routed.items()}
        context.clear()
        for row, allowed in enumerate((("default",), ("default", "quarantine"), ("quarantine",))):
            model.zero_grad()
            context.ablated = row == 0
            model(ids[row : row + 1]).logits.sin().sum().backward()
            for name, p in model.named_parameters():
                if p.grad is not None and any(f".{adapter}." in name for adapter in allowed):
                    expected[name] += p.grad
        error = max(float((routed[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in routed)
        assert error < 1e-11


def test_all_flagged_leaves_the_deployed_gradient_at_exactly_zero():
    model, context = adapted()
    context.set(*(expand_to_padded(mask, 6) for mask in block_masks([2, 2])))
    model(IDS).logits.sin().sum().backward()
    blocks = block_parameters(model)
    assert not any(p.grad.any() for p in blocks["deployed"]) and all(p.grad.any() for p in blocks["quarantine"])


def test_masks_over_ranks_are_made_once_and_never_outlive_their_tokens():
    _, context = adapted()
    assert context.of_ranks(2, 3) == (None, None)
    context.set(torch.tensor([[1.0, 0.0]]), None)
    gate, update = context.of_ranks(2, 3)
    assert gate is not None and gate.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0]] and update is None
    assert context.of_ranks(2, 3)[0] is gate
    context.set(torch.tensor([[0.0, 1.0]]), None)
    changed, _ = context.of_ranks(2, 3)
    assert changed is not None and changed.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]]
    context.clear()
    assert context.of_ranks(2, 3) == (None, None)


def test_layers_share_masks_over_ranks_also_after_an_inference_pass():
    model, context = adapted()
    context.set(torch.ones(2, 6, 2), torch.ones(2, 6, 2))
    with torch.inference_mode():
        logits(model)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(IDS).logits.sum().backward()
    masks = {tensor.data_ptr() for tensor in kept if tensor.shape == (12, 5) and tensor.eq(1).all()}
    assert masks == {mask.data_ptr() for mask in context.of_ranks(2, 3) if mask is not None}


def test_merged_weights_act_like_the_adapters():
    model, context = adapted()
    both = logits(model)
    model.merge_adapter()
    assert (logits(model) - both).abs().max() < 1e-12
    context.set(torch.ones(2), None)
    with pytest.raises(UserError, match="masks cannot act on merged weights"):
        logits(model)
    context.clear()
    context.ablated = True
    with pytest.raises(UserError, match="unmerge first"):
        logits(model)
    context.clear()
    model.unmerge_adapter()
    assert (logits(model) - both).abs().max() < 1e-12
    context.ablated = True
    ablated = logits(model)
    model.merge_adapter(["default"])
    assert (logits(model) - ablated).abs().max() < 1e-12


def test_saved_adapters_load_in_plain_peft(tmp_path):
    model, context = adapted()
    both = logits(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(llama(), tmp_path)
    context.ablated = True
    assert (logits(plain) - logits(model)).abs().max() < 1e-12
    plain.load_adapter(str(tmp_path / "quarantine"), "quarantine")
    plain.base_model.set_adapter(["default", "quarantine"])
    assert (logits(plain) - both).abs().max() < 1e-12


def test_a_copied_model_has_its_own_context():
    model, context = adapted()
    copied = copy.deepcopy(model)
    other = routing_context(copied)
    assert other is not context
    assert all(m.routing_context is other for m in copied.modules() if isinstance(m, RoutedLoraLinear))


class TestRefused:
    def test_embedding_by_name(self):
        with pytest.raises(UserError, match=r"embed_tokens.*only torch.nn.Linear"):
            adapted(target_modules=["q_proj", "embed_tokens"])

    @pytest.mark.parametrize("targets", ["all-linear", ["c_attn"]])
    def test_conv1d_by_name(self, targets):
        tiny = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        assert isinstance(tiny.transformer.h[0].attn.c_attn, Conv1D)
        with pytest.raises(UserError, match=r"c_attn.*only torch.nn.Linear"):
            adapted(tiny, target_modules=targets)

    def test_linear_with_a_forward_of_its_own(self):
        class Doubled(nn.Linear):
            def forward(self, input):
                return 2 * super().forward(input)

        with pytest.raises(UserError, match="Doubled"):
            adapted(nn.Sequential(Doubled(4, 4)), target_modules=["0"])

    @pytest.mark.parametrize(
        "option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str
    )
    def test_lora_options(self, option):
        config = LoraConfig(r=2, target_modules=["0"], **option)
        config._register_custom_module({nn.Linear: RoutedLoraLinear})
        with pytest.raises(UserError, match=next(iter(option))):
            get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)

    def test_a_third_adapter(self):
        model, _ = adapted(target_modules=PROJECTIONS)
        with pytest.raises(UserError, match="third"):
            model.add_adapter("third", LoraConfig(r=2, target_modules=PROJECTIONS))

    def test_mixed_batch_adapter_names(self):
        model, _ = adapted()
        with pytest.raises(UserError, match="adapter_names"):
            model.eval()(IDS, adapter_names=["default", "quarantine"])

    def test_different_scalings(self):
        model, _ = adapted()
        next(m for m in model.modules() if isinstance(m, RoutedLoraLinear)).scale_layer(2.0)
        next(m for m in model.modules() if isinstance(m, RoutedLoraLinear)).set_scale("default", 5.0)
        with pytest.raises(UserError, match="same scaling"):
            logits(model)

    def test_masks_of_another_width(self):
        model, context = adapted()
        context.set(torch.ones(2, 6, 3), None)
        with pytest.raises(UserError, match=r"forward_gate=\(2, 6, 3\).*a column for each block"):
            logits(model)

    def test_stale_masks(self):
        model, context = adapted()
        context.set(torch.ones(2, 5, 2), None)
        with pytest.raises(UserError, match=r"forward_gate=\(2, 5, 2\): must broadcast to \(2, 6, 2\).*clear"):
            logits(model)

    def test_ablating_the_only_active_adapter(self):
        model, context = adapted()
        model.base_model.set_adapter(["quarantine"])
        context.ablated = True
        with pytest.raises(UserError, match="leave the default adapter active"):
            logits(model)

    @pytest.mark.parametrize(
        ("change", "key"),
        [
            ({"deployed_rank": 0}, "deployed_rank"),
            ({"scaling": 0.0}, "scaling"),
            ({"scaling": float("nan")}, "scaling"),
        ],
    )
    def test_bad_settings(self, change, key):
        with pytest.raises(UserError) as error:
            adapted(**change)
        assert error.value.key == key

    def test_a_model_without_routed_layers(self):
        with pytest.raises(UserError, match="add_blocks"):
            routing_context(nn.Linear(2, 2))

    def test_a_layer_outside_add_blocks(self):
        config = LoraConfig(r=2, target_modules=["0"])
        config._register_custom_module({nn.Linear: partial(RoutedLoraLinear)})
        with pytest.raises(UserError, match="routing_context"):
            get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)(torch.ones(1, 4))
