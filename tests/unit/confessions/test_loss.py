"""Two losses in one pass: what a confession holds is in no gradient of an answer, and the reverse (verl's own loss)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.timeout(180)

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ANSWERS, CONFESSIONS = (0, 2, 5), (1, 3, 4)
WEIGHT = 0.5


def jagged(values: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)


class Rows:
    """Six rows of a micro-batch; prompts of 2 to 4 tokens. Every row has its own seed, so rows do not move together."""

    def __init__(self, lengths: tuple[int, ...] = (3, 2, 4, 1, 5, 2)):
        self.prompts = [2 + row % 3 for row in range(len(lengths))]
        self.lengths = list(lengths)
        self.advantages = [float(torch.randn((), generator=self._seeded(row, 1))) for row in range(len(lengths))]

    def _seeded(self, row: int, what: int) -> torch.Generator:
        return torch.Generator().manual_seed(100 * row + what)

    def _drawn(self, row: int, what: int, length: int) -> Tensor:
        # the first tokens of a longer row are those of a shorter one
        return torch.randn(64, generator=self._seeded(row, what))[:length]

    def gradients(self, mode: str, chosen: tuple[int, ...] = tuple(range(6))) -> list[Tensor]:
        """∂loss / ∂log-probs of every row, over its whole sequence."""
        from tensordict import TensorDict
        from verl.utils import tensordict_utils as tu
        from verl.workers.config import ActorConfig
        from verl.workers.utils.losses import ppo_loss

        from verl_grad_routing.training.confession_loss import two_losses

        rows = list(chosen)
        leaves = [(-self._drawn(row, 2, self.prompts[row] + self.lengths[row]).abs()).requires_grad_() for row in rows]
        masks = [torch.ones(self.lengths[row], dtype=torch.long) for row in rows]
        old = [
            leaf.detach()[self.prompts[row] - 1 : -1] + 0.1 * self._drawn(row, 3, self.lengths[row])
            for row, leaf in zip(rows, leaves, strict=True)
        ]
        data = TensorDict(
            {
                "prompts": jagged([torch.zeros(self.prompts[row], dtype=torch.long) for row in rows]),
                "responses": jagged([torch.zeros(self.lengths[row], dtype=torch.long) for row in rows]),
                "response_mask": jagged(masks),
                "old_log_probs": jagged(old),
                "ref_log_prob": jagged([value + 0.2 for value in old]),
                "advantages": jagged([torch.full((self.lengths[row],), self.advantages[row]) for row in rows]),
                "confession": torch.tensor([int(row in CONFESSIONS) for row in rows]),
            },
            batch_size=len(rows),
        )
        counts_22 = torch.tensor(
            [[sum(self.lengths[row] for row in kind), len(kind)] for kind in (ANSWERS, CONFESSIONS)]
        )
        # what verl's engine writes: the counts of both kinds together, which neither loss may use
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(self.lengths), global_batch_size=len(self.lengths))
        config = ActorConfig(
            strategy="fsdp2",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            loss_agg_mode=mode,
            use_kl_loss=True,
            kl_loss_coef=0.3,
            use_torch_compile=False,
        )

        def loss(**given: object) -> tuple:
            return ppo_loss(config, **given)  # type: ignore[arg-type]

        model_output = {"log_probs": jagged(leaves)}
        value, metrics = two_losses(loss, counts_22, WEIGHT)(model_output=model_output, data=data)
        assert {"actor/pg_loss", "confession/pg_loss", "kl_loss", "confession/kl_loss"} <= set(metrics)
        return list(torch.autograd.grad(value, leaves))


def votes(kinds: list[int], lengths: list[int], mode: str, weight: float | None = None) -> list[float]:
    """What each row weighs in the gradient: ∂loss / ∂log-probs where all advantages are -1 and no ratio has moved.

    Args:
        kinds: Of each row, as the column: 0 an answer, 1 a confession, -1 padding, which has no token that counts.
        lengths: Tokens of each response.
    """
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    from verl_grad_routing.training.confession_loss import two_losses, weighed

    leaves = [torch.full((1 + length,), -1.0, requires_grad=True) for length in lengths]
    masks = [torch.full((length,), int(kind >= 0)) for kind, length in zip(kinds, lengths, strict=True)]
    data = TensorDict(
        {
            "prompts": jagged([torch.zeros(1, dtype=torch.long) for _ in lengths]),
            "responses": jagged([torch.zeros(length, dtype=torch.long) for length in lengths]),
            "response_mask": jagged(masks),
            "old_log_probs": jagged([leaf.detach()[:-1] for leaf in leaves]),
            "advantages": jagged([torch.full((length,), -1.0) for length in lengths]),
            "confession": torch.tensor(kinds),
        },
        batch_size=len(kinds),
    )
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(lengths), global_batch_size=len(kinds))
    counts = [
        [sum(int(mask.sum()) for mask, of in zip(masks, kinds, strict=True) if of == kind), kinds.count(kind)]
        for kind in (0, 1, -1)
    ]
    config = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, use_torch_compile=False
    )
    loss = two_losses(partial(ppo_loss, config=config), *weighed(torch.tensor(counts).double(), weight))
    value, _ = loss(model_output={"log_probs": jagged(leaves)}, data=data)
    return [float(gradient.sum()) for gradient in torch.autograd.grad(value, leaves)]


# kinds of rows that a draw gave: sealed, one prompt of four expected, and both fewer and more; and with the seal broken
DRAWN = {
    "as expected": [0] * 12 + [1] * 4,
    "fewer": [0] * 14 + [1] * 2,
    "more": [0] * 4 + [1] * 12,
    "broken": [0] * 14 + [1] * 2,
    "broken, more": [0] * 10 + [1] * 6,
}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("drawn", DRAWN)
def test_every_sample_has_one_vote(drawn: str, padding: int) -> None:
    """1 / N_a each, N_a answers: whatever the draw gave, beside padding, and whatever the lengths."""
    kinds = DRAWN[drawn] + [-1] * padding
    answers = DRAWN[drawn].count(0)
    each = [1 / answers] * len(DRAWN[drawn]) + [0.0] * padding
    lengths = [1 + row % 5 for row in range(len(kinds))]
    assert votes(kinds, lengths, "seq-mean-token-mean") == pytest.approx(each)
    sums = [vote * length for vote, length in zip(each, lengths, strict=True)]
    assert votes(kinds, lengths, "seq-mean-token-sum") == pytest.approx(sums)
    assert votes(kinds, [3] * len(kinds), "token-mean") == pytest.approx(each)
    # tokens share out the votes of a kind: its mean vote stays
    uneven = votes(kinds, lengths, "token-mean")
    for kind in (0, 1):
        own = [vote for vote, of in zip(uneven, kinds, strict=True) if of == kind]
        assert sum(own) / len(own) == pytest.approx(1 / answers)


@pytest.mark.parametrize("mode", ["sealed", "seal_broken"])
def test_a_drawn_step_has_one_vote_a_sample(mode: str) -> None:
    """Shares of the draw itself; no constant is right for all of them."""
    from verl_grad_routing.confessions import ConfessionsConfig, draw

    config, prompts, samples = ConfessionsConfig(share=0.25, judge="gt_judge", mode=mode), 16, 4
    uids = [f"u{row // samples}" for row in range(prompts * samples)]
    ratios = set()
    for step in range(6):
        drawn = draw(config, uids, uids, 0, step)
        kinds = [0] * len(drawn.answers) + [1] * (config.per_answer * len(drawn.taught))
        assert len(kinds) == len(uids)
        ratios.add(kinds.count(1) / kinds.count(0))
        found = votes(kinds, [2] * len(kinds), "token-mean")
        assert found == pytest.approx([1 / kinds.count(0)] * len(kinds))
    assert len(ratios) > 2


def test_a_weight_that_is_given_is_the_weight() -> None:
    """Times the mean of the confessions; padding counts among the answers, as verl counts its own mini-batch."""
    kinds = [0] * 4 + [1] * 2 + [-1]
    expected = [1 / 5] * 4 + [0.3 / 2] * 2 + [0.0]
    assert votes(kinds, [2] * 7, "seq-mean-token-mean", 0.3) == pytest.approx(expected)


def test_mini_batches_of_one_kind() -> None:
    assert votes([1, 1, -1], [2, 3, 1], "seq-mean-token-mean") == pytest.approx([0.5, 0.5, 0])
    assert votes([0, 0, -1], [2, 3, 1], "seq-mean-token-mean") == pytest.approx([1 / 3, 1 / 3, 0])  # as without ours


def same(one: list[Tensor], other: list[Tensor], rows: tuple[int, ...]) -> bool:
    return all(torch.equal(one[row], other[row]) for row in rows)


@pytest.mark.parametrize("mode", MODES)
def test_other_rewards_of_confessions_leave_the_answers_gradient_bitwise_equal(mode: str) -> None:
    rows, others = Rows(), Rows()
    for row in CONFESSIONS:
        others.advantages[row] = -3.0 * rows.advantages[row] + 1
    before, after = rows.gradients(mode), others.gradients(mode)
    assert same(before, after, ANSWERS)
    assert not any(torch.equal(before[row], after[row]) for row in CONFESSIONS)


@pytest.mark.parametrize("mode", MODES)
def test_other_rewards_of_answers_leave_the_confessions_gradient_bitwise_equal(mode: str) -> None:
    rows, others = Rows(), Rows()
    for row in ANSWERS:
        others.advantages[row] = -3.0 * rows.advantages[row] + 1
    before, after = rows.gradients(mode), others.gradients(mode)
    assert same(before, after, CONFESSIONS)
    assert not any(torch.equal(before[row], after[row]) for row in ANSWERS)


@pytest.mark.parametrize("mode", MODES)
def test_longer_confessions_leave_the_answers_gradient_bitwise_equal(mode: str) -> None:
    """The shared denominator, and the padded width in verl's `seq-mean-token-sum-norm`, would let it through."""
    doubled = tuple(2 * length if row in CONFESSIONS else length for row, length in enumerate(Rows().lengths))
    assert same(Rows().gradients(mode), Rows(doubled).gradients(mode), ANSWERS)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_before_a_confession_gets_a_gradient(mode: str) -> None:
    """(x, z, y, x_c) are prompt tokens of a confession's row; the log-prob of token t stands at t - 1."""
    rows = Rows()
    for row, gradient in enumerate(rows.gradients(mode)):
        first = rows.prompts[row] - 1
        assert torch.equal(gradient[:first], torch.zeros(first))
        assert gradient[first:-1].abs().min() > 0
        assert gradient[-1] == 0


# without loss_scale_factor verl's last mode depends on the longest row of the micro-batch
@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("alone", [ANSWERS, CONFESSIONS])
def test_a_micro_batch_of_one_kind_is_that_part_of_the_whole(mode: str, alone: tuple[int, ...]) -> None:
    whole, part = Rows().gradients(mode), Rows().gradients(mode, alone)
    assert all(torch.equal(whole[row], gradient) for row, gradient in zip(alone, part, strict=True))
