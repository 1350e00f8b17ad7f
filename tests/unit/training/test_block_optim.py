"""How blocks are optimised, on numbers small enough to do by hand. On a real engine: tests/engine/test_optim.py."""

from __future__ import annotations

import pytest
import torch

from verl_grad_routing.config import BlockOptimConfig, BlocksConfig
from verl_grad_routing.errors import UserError
from verl_grad_routing.routing import Route, block_masks, routed_lora

pytestmark = pytest.mark.timeout(180)


class TestLeakage:
    """AdamW with lr .1, betas (.9, .95), decay .1 from p = 1: a gradient of 1, then a step that is another block's."""

    def train(self, second: torch.Tensor | None) -> float:
        p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        adam = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        for gradient in (torch.ones(1, dtype=torch.float64), second):
            p.grad = gradient
            adam.step()
        return p.item()

    def test_a_zeroed_gradient_leaks_by_momentum_and_decay(self):
        # p₁ = 1·(1 - .01) - .1 = .89; then m̂ = .09/.19, v̂ = .0475/.0975 and decay move it once more
        assert self.train(torch.zeros(1, dtype=torch.float64)) == pytest.approx(0.8132352, abs=1e-7)

    def test_a_frozen_block_does_not_move(self):
        assert self.train(None) == pytest.approx(0.89, abs=1e-8)

    @pytest.mark.parametrize(("freeze", "expected"), [(True, 0.89), (False, 0.8132352)])
    def test_a_step_without_mass(self, freeze, expected):
        """What is left in ``grad`` is no gradient of such a block: verl's own zeroing may have been skipped."""
        from verl_grad_routing.training.block_step import BlockStep

        blocks = {name: [torch.nn.Parameter(torch.ones(1).double())] for name in ("deployed", "quarantine")}
        groups = [{"params": parameters} for parameters in blocks.values()]
        adam = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        step = BlockStep(adam, blocks, dict.fromkeys(blocks, 10.0), [], freeze_inactive=freeze)
        for mass in (1.0, 0.0):
            blocks["deployed"][0].grad = torch.ones(1).double()
            step([mass, 0.0], lambda: None)
        assert blocks["deployed"][0].item() == pytest.approx(expected, abs=1e-7)


class TestTugOfWar:
    """Opposed targets for the sum of two blocks: clean rows want 2 and train both, flagged rows want 1.

    y = d + q, losses (y - t)², plain gradient descent from 0 with rate .01, 4001 steps: the sum settles at (2·2 + 1)/3
    while the blocks run apart without bound, each by 2·.01·⅓ a step. A KEEP row of weight .2, quarantine absent, that
    wants 2 as well stops them at (4.5, -3): kxcloud/gradient-routing, snippets/tug_of_war_demo.py.
    """

    def gradient(self, B: torch.Tensor, coherence: float) -> torch.Tensor:
        """Of (deployed, quarantine), through the routed kernel."""
        ones = torch.ones(2, 1, dtype=torch.float64)  # both A, a number each
        B = B.clone().requires_grad_()
        gate, update = (mask.double() for mask in block_masks([Route.ABSORB, Route.ROUTE, Route.KEEP]))
        targets, weights = (
            torch.tensor(values, dtype=torch.float64) for values in ([2.0, 1.0, 2.0], [1.0, 1.0, coherence])
        )
        y = routed_lora(ones.new_ones(3, 1), ones, B[None], gate, update, 1.0)[:, 0]
        (gradient,) = torch.autograd.grad((weights * (y - targets) ** 2).sum(), B)
        return gradient

    def train(self, coherence: float, steps: int = 4001) -> tuple[float, float]:
        at_zero = self.gradient(torch.zeros(2).double(), coherence)
        axes = torch.eye(2, dtype=torch.float64)
        slopes = torch.stack([self.gradient(axis, coherence) - at_zero for axis in axes], dim=1)  # it is affine
        (a, b), (c, e) = slopes.tolist()
        u, v = at_zero.tolist()
        deployed = quarantine = 0.0
        for _ in range(steps):
            step = (a * deployed + b * quarantine + u, c * deployed + e * quarantine + v)
            deployed, quarantine = deployed - 0.01 * step[0], quarantine - 0.01 * step[1]
        return deployed, quarantine

    def test_without_a_clean_pass_the_blocks_run_apart(self):
        deployed, quarantine = self.train(0.0)
        assert (deployed, quarantine) == pytest.approx((27.2289, -25.5622), abs=1e-4)
        assert deployed + quarantine == pytest.approx(5 / 3, abs=1e-9)

    def test_a_pass_without_the_quarantine_bounds_them(self):
        assert self.train(0.2, steps=20_000) == pytest.approx((4.5, -3.0), abs=1e-9)


class TestClipping:
    """Norms .3 and 4 under a limit of 1 (specimens of a quiet deployed block beside a loud quarantine)."""

    @pytest.mark.parametrize(("jointly", "expected"), [(False, 0.3), (True, 0.0747899)])
    def test_shared_against_separate(self, jointly, expected):
        from verl_grad_routing.training.block_step import BlockStep

        deployed, quarantine = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        blocks = {"deployed": [deployed], "quarantine": [quarantine]}
        sgd = torch.optim.SGD([{"params": parameters} for parameters in blocks.values()], lr=1.0)
        step = BlockStep(sgd, blocks, {"deployed": 1.0, "quarantine": 1.0}, [], jointly=jointly)
        deployed.grad, quarantine.grad = torch.tensor([0.3, 0.0]), torch.tensor([0.0, 4.0])
        step([1.0, 1.0], lambda: None)
        assert deployed.norm().item() == pytest.approx(expected, abs=1e-6)
        assert step.metrics["routing/grad_norm/deployed"] == pytest.approx(0.3)


class TestGroups:
    class Actor:
        lr, weight_decay, optimizer = 0.01, 0.1, "AdamW"

    def groups(self, names=("deployed", "quarantine"), **settings):
        from verl_grad_routing.training.block_optim import parameter_groups

        blocks = {name: [torch.nn.Parameter(torch.ones(1))] for name in names}
        found = parameter_groups(blocks, BlockOptimConfig(**settings), self.Actor())
        return [{key: value for key, value in group.items() if key not in ("params", "block")} for group in found]

    def test_nothing_is_set_by_default(self):
        assert self.groups() == [{}, {}]

    def test_what_is_set(self):
        own = {"lr_ratio_quarantine": 2.0, "betas_deployed": (0.8, 0.9), "weight_decay_quarantine": 0.0}
        assert self.groups(**own) == [{"betas": (0.8, 0.9)}, {"lr": 0.02, "weight_decay": 0.0}]
        assert self.groups(decay_to_start=True) == [{"weight_decay": 0.0}, {"weight_decay": 0.0}]

    def test_what_belongs_to_neither_block_may_have_its_own(self):
        names, own = ("deployed", "quarantine", "shared"), {"betas_shared": (0.9, 0.95), "weight_decay_shared": 0.2}
        assert self.groups(names, **own) == [{}, {}, {"betas": (0.9, 0.95), "weight_decay": 0.2}]
        assert self.groups(names) == [{}, {}, {}]

    @pytest.mark.parametrize("own", [{"betas_shared": (0.9, 0.95)}, {"weight_decay_shared": 0.2}])
    def test_adapters_share_nothing(self, own):
        with pytest.raises(UserError, match=r"optim\.\w+_shared=.*adapters share nothing"):
            BlocksConfig(optim=BlockOptimConfig(**own))
        BlocksConfig(kind="dense", optim=BlockOptimConfig(**own))

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"lr_ratio_quarantine": 0}, "lr_ratio_quarantine=0"),
            ({"betas_deployed": (0.9,)}, "betas_deployed"),
            ({"betas_quarantine": (0.9, 1.0)}, "betas_quarantine"),
            ({"betas_shared": 0.9}, r"betas_shared=0\.9"),
            ({"weight_decay_deployed": -0.1}, "weight_decay_deployed"),
            ({"mean_over": "subset"}, "own_rollouts"),
        ],
    )
    def test_refusals(self, settings, named):
        with pytest.raises(UserError, match=named):
            BlockOptimConfig(**settings)

    def test_a_limit_of_its_own_contradicts_a_joint_norm(self):
        with pytest.raises(UserError, match=r"clip_norm_deployed=1\.0: blocks are clipped jointly"):
            BlocksConfig(clip_norm_deployed=1.0, optim=BlockOptimConfig(clip_jointly=True))

    def test_sgd_has_no_betas(self):
        from verl_grad_routing.training.block_optim import check_betas

        with pytest.raises(UserError, match="optimizer='SGD'"):
            check_betas("SGD")
