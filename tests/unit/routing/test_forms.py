"""Forms of blocks: where they start, what they compute, what leaves; against formulas written out on their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.unit.routing.reference import mix, rollout_loss
from verl_grad_routing.config import BlocksConfig
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import (
    BLOCKS,
    FORMS,
    INITIALISATIONS,
    Contrast,
    RoutedLoraLinear,
    add_blocks,
    block_of,
    block_parameters,
    check_total_rank,
    deployed_only,
    get_form,
    initialisation_report,
    initialise_blocks,
    is_zero,
    join_blocks,
    plain_adapters,
    register_initialisation,
)
from verl_grad_routing.routing.bases import ROW_NORM, BlockWeights
from verl_grad_routing.routing.forms import COLUMN_NORM, cayley

D_IN, HIDDEN, D_OUT = 18, 20, 12
S = 0.7
OTHERS = ("two_sided", "antipasto", "antipasto_lineage")
FROM_PAIRS = ("corda", "scorda", "scorda_rev")
BASES = ("pissa_split", "random_orthogonal", *FROM_PAIRS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DIFFERENCES = {"one": drawn(5, D_IN, seed=8) + 0.3, "two": drawn(5, HIDDEN, seed=9) + 0.3}


class Net(nn.Module):
    """Two adapted layers with attention-like mixing between them; a rollout alone in a pass, or many with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D_IN, HIDDEN), nn.Linear(HIDDEN, D_OUT)
        with torch.no_grad():
            for index, p in enumerate(self.parameters()):
                p.copy_(drawn(*p.shape, seed=20 + index) / p.shape[-1] ** 0.5)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        hidden = self.one(x)
        return self.two(torch.cat([mix(part) for part in hidden.split(lengths)]))


def build(form: str, init: str = "pissa_split", ranks: tuple[int, int] = (3, 3), moved: float = 0.0):
    """The adapted net in float64, its context, and the layers; ``moved``: scale of what trains."""
    contrast = Contrast(DIFFERENCES) if init in FROM_PAIRS else None
    model, context = add_blocks(
        Net().double(),
        deployed_rank=ranks[0],
        quarantine_rank=ranks[1],
        scaling=S,
        target_modules=["one", "two"],
        init=None,
        form=form,
        seed=3,
    )
    for p in model.parameters():
        p.data = p.data.double()  # PEFT makes adapters in float32
    initialise_blocks(model, init, 3, contrast)
    if moved:
        for index, p in enumerate(p for block in block_parameters(model).values() for p in block):
            p.data += moved * drawn(*p.shape, seed=40 + index)
    return model, context, {name: m for name, m in model.named_modules() if isinstance(m, RoutedLoraLinear)}


def parts(layer: RoutedLoraLinear, adapter: str) -> dict[str, Tensor]:
    found = {name: p for name, p in layer.named_parameters() if f".{adapter}." in name}
    return {name.partition("_")[2].partition(".")[0]: p for name, p in found.items()}


def delta(form: str, held: dict[str, Tensor]) -> Tensor:
    """``dW / s`` of one block from its formula in the lineage, dense."""
    if form == "two_sided":
        A, B = held["A0"] + held["A"], held["B0"] + held["B"]
        return B @ A - held["B0"] @ held["A0"]
    rotation = torch.eye(len(held["gain"]), dtype=torch.float64)
    if "turn" in held:
        K = held["turn"] - held["turn"].t()
        rotation = torch.linalg.inv(rotation + K) @ (rotation - K)
    return held["B"] @ torch.diag(torch.tanh(held["gain"])) @ rotation @ held["A"]


class TestStart:
    @pytest.mark.parametrize("init", BASES)
    @pytest.mark.parametrize("form", OTHERS)
    @pytest.mark.parametrize("ranks", [(3, 3), (4, 2)])
    def test_the_model_is_the_base_model_bit_for_bit(self, form, init, ranks):
        model, context, layers = build(form, init, ranks)
        x = drawn(7, D_IN, seed=5)
        plain = Net().double()(x, [4, 3])
        assert torch.equal(model(x, [4, 3]), plain)
        context.ablated = True
        assert torch.equal(model(x, [4, 3]), plain)
        state = {name: p for name, p in model.named_parameters() if block_of(name)}
        assert is_zero(state, "deployed") and is_zero(state, "quarantine")
        for layer in layers.values():  # the ranks are the blocks' own
            assert [len(layer.reads(adapter)) for adapter in BLOCKS.values()] == list(ranks)

    @pytest.mark.parametrize("init", BASES)
    @pytest.mark.parametrize("ranks", [(3, 3), (4, 2)])
    def test_two_sided_blocks_are_orthogonal_and_matched_in_scale(self, init, ranks):
        model, _, layers = build("two_sided", init, ranks)
        plain = build("lora", init, ranks)[2]
        for name, layer in layers.items():
            held = [parts(layer, adapter) for adapter in BLOCKS.values()]
            rows, columns = torch.cat([h["A0"] for h in held]), torch.cat([h["B0"] for h in held], dim=1).t()
            eye = torch.eye(sum(ranks), dtype=torch.float64)
            assert (rows @ rows.t() - eye * ROW_NORM**2).abs().max() < 1e-12
            assert (columns @ columns.t() - eye * COLUMN_NORM**2).abs().max() < 1e-12
            for h, adapter in zip(held, BLOCKS.values(), strict=True):  # the same basis as the one-sided block's
                assert torch.equal(h["A0"], parts(plain[name], adapter)["A"])
        report = initialisation_report(model)
        assert report.max_abs_B == 0 and report.max_cross_cosine < 1e-10
        for span in (report.deployed_row_norms, report.quarantine_row_norms):
            assert span == pytest.approx((ROW_NORM, ROW_NORM), rel=1e-12)
        for span in (report.deployed_column_norms, report.quarantine_column_norms):
            assert span == pytest.approx((COLUMN_NORM, COLUMN_NORM), rel=1e-12)
        assert "frozen column norms deployed 0.5774 to 0.5774" in str(report) and "|dA|, |dB| at most" in str(report)

    def test_columns_are_the_lineages(self):
        """pissa.py:42-51: left singular vectors of W; corda.py:45-55: of W C^½; scorda.py:69-86: unit(W u) first."""
        W = Net().double().one.weight.detach()
        D = DIFFERENCES["one"].float().double()  # a contrast is kept in float32
        U = torch.linalg.svd(W)[0]
        for block, first in (("default", 0), ("quarantine", 1)):
            B0 = parts(build("two_sided")[2]["base_model.model.one"], block)["B0"]
            assert ((B0 * U[:, first:6:2]).sum(0).abs() / COLUMN_NORM - 1).abs().max() < 1e-9
        C = D.t() @ D / 5
        C += 1e-3 * C.trace() / D_IN * torch.eye(D_IN, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(C)
        U = torch.linalg.svd(W @ vectors @ values.sqrt().diag() @ vectors.t())[0]
        for block, first in (("default", 0), ("quarantine", 1)):
            B0 = parts(build("two_sided", "corda")[2]["base_model.model.one"], block)["B0"]
            assert ((B0 * U[:, first:6:2]).sum(0).abs() / COLUMN_NORM - 1).abs().max() < 1e-8
        u_out = W @ D.mean(0)
        for init, block in (("scorda", "quarantine"), ("scorda_rev", "default")):
            B0 = parts(build("two_sided", init)[2]["base_model.model.one"], block)["B0"]
            assert B0[:, 0] @ u_out / u_out.norm() == pytest.approx(COLUMN_NORM, rel=1e-9)

    def test_a_step_from_the_start_moves_both_sides(self):
        """Unlike plain LoRA, whose A has no gradient while B is zero."""
        model, _, layers = build("two_sided")
        model(drawn(5, D_IN), [5]).square().sum().backward()
        for block in block_parameters(model).values():
            assert len(block) == 4 and all(bool(p.grad.any()) for p in block)
        for layer in layers.values():
            assert parts(layer, "default")["A0"].grad is None

    def test_antipasto_multiplies_what_w_does_along_a_direction(self):
        """With one gain and no rotation, W acts 1 + s tanh g times along that direction, and as before elsewhere."""
        _, _, layers = build("antipasto")
        layer = layers["base_model.model.one"]
        held = parts(layer, "default")
        held["gain"].data[1] = 0.4
        W, v = layer.base_layer.weight, held["A"][1]
        assert v.norm() == pytest.approx(1, rel=1e-12)
        changed = W + layer.get_delta_weight("default")
        assert (changed @ v - (1 + S * torch.tanh(torch.tensor(0.4))) * (W @ v)).abs().max() < 1e-7
        assert (changed @ held["A"][0] - W @ held["A"][0]).abs().max() < 1e-12

    @pytest.mark.parametrize("init", [*BASES, "kaiming_uniform"])
    @pytest.mark.parametrize("form", list(FORMS))
    def test_capacity_is_matched_unless_asked_otherwise(self, form, init):
        def sizes(**ranks) -> list[int]:
            return [sum(p.numel() for p in block) for block in block_parameters(build(form, init, **ranks)[0]).values()]

        deployed, quarantine = sizes(ranks=(BlocksConfig().deployed_rank // 2, BlocksConfig().quarantine_rank // 2))
        rotation = 2 * 4**2 if form == "antipasto_lineage" else 0  # of the quarantine alone, in both layers
        assert deployed == quarantine - rotation
        if form == "antipasto":
            assert sizes(ranks=(4, 2)) == [2 * (4 + 16), 2 * (2 + 4)]
        elif form != "antipasto_lineage":
            assert sizes(ranks=(4, 2)) == [rank * (D_IN + HIDDEN + HIDDEN + D_OUT) for rank in (4, 2)]


class TestTraining:
    @pytest.mark.parametrize("ranks", [(3, 3), (4, 2)])
    @pytest.mark.parametrize("form", OTHERS)
    def test_gradients_of_a_mixed_batch_are_sums_of_allowed_rollouts(self, form, ranks):
        model, context, layers = build(form, ranks=ranks, moved=0.3)
        lengths = [3, 1, 5, 2, 4, 1]
        x, target = drawn(sum(lengths), D_IN, seed=6), drawn(sum(lengths), D_OUT, seed=7)
        gate = torch.tensor([[1, 0], [1, 1], [1, 1], [0.5, 1], [1, 1], [1, 0]], dtype=torch.float64)
        update = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0.25], [0, 1], [1, 0]], dtype=torch.float64)
        tokens = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
        context.set(gate[tokens], update[tokens])
        rollout_loss(model(x, lengths), target).backward()
        expected = self.one_by_one(form, layers, x, target, lengths, gate, update)
        found = {name: p.grad for name, p in model.named_parameters() if block_of(name) and p.requires_grad}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = max(1.0, float(gradient.abs().max()))
            assert (found[name] - gradient).abs().max() < 1e-6 * scale, name  # the rotation is solved in float64
            assert bool(gradient.any())

    def one_by_one(self, form, layers, x, target, lengths, gate, update):
        plain = Net().double()
        names = {name: p for name, p in self.named(layers).items() if p.requires_grad}
        totals = {name: torch.zeros_like(p) for name, p in names.items()}
        for row, (x_row, t_row) in enumerate(zip(x.split(lengths), target.split(lengths), strict=True)):
            hidden = x_row
            for index, (name, base) in enumerate(plain.named_children()):
                held = [parts(layers[f"base_model.model.{name}"], adapter) for adapter in BLOCKS.values()]
                dW = sum(g * delta(form, h) for g, h in zip(gate[row], held, strict=True))
                hidden = hidden @ (base.weight + S * dW).t() + base.bias
                hidden = mix(hidden) if index == 0 else hidden
            own = torch.autograd.grad(rollout_loss(hidden, t_row), list(names.values()), allow_unused=True)
            for (name, total), gradient in zip(totals.items(), own, strict=True):
                if gradient is not None:
                    total += update[row, 0 if ".default." in name else 1] * gradient
        return totals

    @staticmethod
    def named(layers) -> dict[str, Tensor]:
        return {f"{m}.{n}": p for m, layer in layers.items() for n, p in layer.named_parameters() if "lora_" in n}

    @pytest.mark.parametrize("form", OTHERS)
    def test_leaving_the_disabled_adapter_keeps_frozen_parts_frozen(self, form):
        model = build(form, moved=0.1)[0]
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        with model.disable_adapter():
            assert torch.equal(model(x := drawn(4, D_IN), [4]), Net().double()(x, [4]))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        assert all(name.split(".lora_")[1].split(".")[0] in get_form(form).trained for name in trained)

    def test_small_deltas_survive_bfloat16(self):
        """`B A - B₀ A₀` computed as the difference of two products loses them; this form does not."""
        layers = build("two_sided", moved=1e-4)[2]
        layer = layers["base_model.model.one"]
        x = drawn(64, D_IN, seed=11)
        expected = x @ (S * sum(delta("two_sided", parts(layer, a)) for a in BLOCKS.values())).t()
        low = copy.deepcopy(layer).bfloat16()
        low.base_layer.weight.data.zero_()
        low.base_layer.bias.data.zero_()
        found = low(x.bfloat16()).double()
        assert (found - expected).norm() < 0.01 * expected.norm()
        difference = torch.zeros_like(expected)
        for adapter in BLOCKS.values():
            h = {name: p.bfloat16() for name, p in parts(layer, adapter).items()}
            A, B, xl = h["A0"] + h["A"], h["B0"] + h["B"], x.bfloat16()
            difference += S * ((xl @ A.t()) @ B.t() - (xl @ h["A0"].t()) @ h["B0"].t()).double()
        assert (difference - expected).norm() > 0.3 * expected.norm()


class TestWhatLeaves:
    @pytest.mark.parametrize("ranks", [(3, 3), (4, 2)])
    @pytest.mark.parametrize("form", OTHERS)
    def test_plain_adapters_are_the_exact_difference(self, form, ranks):
        model, _, layers = build(form, ranks=ranks, moved=0.3)
        state = {name: p.detach() for name, p in model.named_parameters() if block_of(name)}
        joined, deployed = join_blocks(state), deployed_only(state)
        sides = get_form(form).sides
        for module, layer in layers.items():
            held = [{n: p.detach() for n, p in parts(layer, adapter).items()} for adapter in BLOCKS.values()]
            deltas = [delta(form, h) for h in held]
            for found, expected, rank in ((joined, sum(deltas), sum(ranks)), (deployed, deltas[0], ranks[0])):
                A, B = found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"]
                assert A.shape[0] == B.shape[1] == sides * rank
                assert (B @ A - expected).abs().max() < 1e-12
            for adapter, expected in zip(BLOCKS.values(), deltas, strict=True):
                assert (layer.get_delta_weight(adapter) - S * expected).abs().max() < 1e-12
        assert {name for name in plain_adapters(state) if "lora_" in name} == {
            f"{module}.lora_{side}.{adapter}.weight"
            for module in layers
            for side in "AB"
            for adapter in BLOCKS.values()
        }
        assert not is_zero(state, "deployed") and not is_zero(state, "quarantine")

    @pytest.mark.parametrize("form", OTHERS)
    def test_merged_and_ablated_models_agree_with_the_routed_one(self, form):
        model, context, layers = build(form, moved=0.3)
        x = drawn(6, D_IN, seed=12)
        both = model(x, [6])
        context.ablated = True
        deployed = model(x, [6])
        for adapters, expected in ((["default"], deployed), (["default", "quarantine"], both)):
            context.ablated = len(adapters) == 1
            for layer in layers.values():
                layer.merge(adapter_names=adapters)
            assert (model(x, [6]) - expected).abs().max() < 1e-10
            for layer in layers.values():
                layer.unmerge()
        assert (deployed - both).abs().max() > 1e-3

    def test_plain_lora_is_passed_through(self):
        state = {name: p for name, p in build("lora", moved=0.1)[0].named_parameters() if "lora_" in name}
        assert all(plain_adapters(state)[name] is p for name, p in state.items())

    def test_ranks_that_vllm_takes(self):
        """vLLM v0.24 to v0.28: 1, 8, 16, 32, 64, 128, 256, 320, 512; the two-sided adapter has twice the rank."""
        assert [check_total_rank(total, 2) for total in (4, 8, 16, 32, 64, 128, 160, 256)][-1] == 256
        with pytest.raises(UserError, match=r"=20: use 32, the next total rank whose adapter, 2 times as large"):
            check_total_rank(20, 2)
        with pytest.raises(UserError, match=r"=512: use 256, the largest"):
            check_total_rank(512, 2)


def test_the_cayley_transform_is_a_rotation():
    """(1 - i t)/(1 + i t) in two dimensions: X = [[0, t], [0, 0]] turns by 2 atan t."""
    R = cayley(drawn(5, 5, seed=2))
    assert (R @ R.t() - torch.eye(5, dtype=torch.float64)).abs().max() < 1e-12
    assert torch.linalg.det(R) == pytest.approx(1, rel=1e-10)
    angle = 2 * torch.atan(torch.tensor(0.3, dtype=torch.float64))
    turned = cayley(torch.tensor([[0.0, 0.3], [0.0, 0.0]], dtype=torch.float64))
    expected = torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
    assert (turned - expected).abs().max() < 1e-12


class TestRefused:
    def test_names(self):
        with pytest.raises(UserError, match=r"form='twosided': known: lora, two_sided, antipasto"):
            build("twosided")
        with pytest.raises(UserError, match="one form"):
            get_form(["lora", "two_sided"])  # type: ignore[arg-type]

    def test_more_directions_than_outputs(self):
        with pytest.raises(UserError, match=r"\(two\)=14: two-sided blocks need as many outputs, and a layer has 12"):
            build("two_sided", "random_orthogonal", (7, 7))

    def test_images_that_depend_on_each_other(self):
        net = Net().double()
        with torch.no_grad():
            net.one.weight[:, 1:] = 0
        with pytest.raises(UserError, match=r"basis direction \(one\)=1: it lies in the span of those before it"):
            add_blocks(
                net,
                deployed_rank=2,
                quarantine_rank=2,
                scaling=1.0,
                target_modules=["one"],
                init="random_orthogonal",
                form="two_sided",
            )

    @pytest.mark.parametrize("form", ["two_sided", "antipasto"])
    def test_an_initialisation_with_B(self, form):
        @register_initialisation("with_B")
        def with_B(d_in: int, d_out: int, r_d: int, r_q: int, generator: torch.Generator) -> BlockWeights:
            return BlockWeights(*(torch.ones(r, d_in) for r in (r_d, r_q)), *(torch.ones(d_out, r) for r in (r_d, r_q)))

        try:
            with pytest.raises(UserError, match=r"form \(one\)=.*needs an init that starts with B = 0"):
                build(form, "with_B")
        finally:
            del INITIALISATIONS["with_B"]
