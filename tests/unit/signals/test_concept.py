"""The concept direction of advantage modification, by hand, and the positions it is read at."""

import numpy as np
import pytest
import torch

from verl_grad_routing.detectors import DETECTORS
from verl_grad_routing.directions import Pair, PairSet, concept_direction, position_mask, project
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions import INTERVENTIONS, Judged


def test_the_direction_is_the_mean_difference_over_pairs_and_layers_unnormalised():
    wanted = torch.zeros(2, 2, 3)
    unwanted = torch.tensor([[[4.0, 0, 0], [0, 2, 0]], [[0, 2, 0], [0, 0, 0]]])
    direction = concept_direction(unwanted, wanted, layers=(2, 3))
    assert direction.vectors_Ld.tolist() == [[1, 1, 0]] * 2
    # <mean_l h_l, d>: pair 1 (2,1,0) -> 3, pair 2 (0,1,0) -> 1
    assert direction.unwanted_scores_P.tolist() == [3, 1] and direction.wanted_mean == 0
    hidden = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = hidden.mean(1) @ torch.tensor([1.0, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(project(hidden, direction.vectors_Ld[None])[:, 0], expected)


def test_held_out_accuracy_is_of_that_direction():
    wanted = torch.zeros(4, 1, 2)
    unwanted = torch.tensor([[[1.0, 0]], [[1, 0.1]], [[1, -0.1]], [[-1, 0]]])
    assert concept_direction(unwanted, wanted).held_out_accuracy == 0.75


def test_equal_sides_are_refused():
    with pytest.raises(UserError, match="same mean activation"):
        concept_direction(torch.ones(2, 1, 3), torch.ones(2, 1, 3))


def test_positions_by_hand():
    mask = torch.tensor([1, 1, 0, 1, 0])
    assert position_mask(mask, 2, "resp_mean").int().tolist() == [0, 0, 1, 1, 0, 1, 0]
    assert position_mask(mask, 2, "resp_last").int().tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert position_mask(mask, 2, "prompt_last").int().tolist() == [0, 1, 0, 0, 0, 0, 0]
    for position in ("resp_mean", "resp_last", "prompt_last"):
        assert not position_mask(torch.zeros(1), 3, position).any()


def test_pairs_are_never_read_in_the_prompt_that_both_sides_share():
    def detector(position):
        settings = {"name": "concept_act", "pairs": "p.jsonl", "position": position}
        return DETECTORS.build(settings, "grad_routing.detector")

    assert [detector(p).pair_position for p in ("resp_last", "resp_mean", "prompt_last")] == [
        "resp_last",
        "resp_mean",
        "resp_last",
    ]
    with pytest.raises(UserError, match=r"grad_routing.detector.position='last': choose one of"):
        detector("last")


# ---- the held-out gate ----


def pair_set(held_out):
    tags = [("held_out",) if row in held_out else ("fit",) for row in range(6)]
    pairs = tuple(Pair(f"p{row}", "q", "a", "b", tag) for row, tag in enumerate(tags))
    return PairSet(pairs, "hash", "p.jsonl")


def fitted(held_out, gaps, **settings):
    """A detector fitted on six pairs of one layer whose sides differ by ``gaps``, [6] along one axis."""
    detector = DETECTORS.build({"name": "concept_act", "pairs": "p.jsonl", **settings}, "grad_routing.detector")
    detector.expect(pair_set(held_out))
    wanted = torch.ones(6, 1, 2)
    unwanted = wanted + torch.tensor([[gap, 0.0] for gap in gaps])[:, None]
    detector.fit(unwanted, wanted, (1,), 2, "hash")
    return detector


def test_held_out_pairs_do_not_enter_the_direction_and_judge_it():
    detector = fitted({1, 4}, [1.0, 50, 2, 3, -1, 2], min_accuracy=0.5)
    assert detector.direction.vectors_Ld.tolist() == [[2, 0]]  # mean of 1, 2, 3, 2
    assert detector.direction_report()["detector/held_out_accuracy"] == 0.5
    assert len(detector.pair_scores[0]) == 4
    everything = fitted({1, 4}, [1.0, 50, 2, 3, -1, 2], held_out_tag=None, min_accuracy=0.5)
    assert everything.direction.vectors_Ld.tolist() == [[9.5, 0]]


def test_a_direction_that_fails_its_held_out_pairs_is_refused_or_warned_about():
    told = r"grad_routing.detector.min_accuracy=1.0: the direction orders 50% of the held-out pairs rightly"
    with pytest.raises(UserError, match=told):
        fitted({1, 4}, [1.0, 1, 2, 3, -1, 2])
    with pytest.warns(UserWarning, match=told):
        fitted({1, 4}, [1.0, 1, 2, 3, -1, 2], on_low_accuracy="warn")
    assert fitted({1, 4}, [1.0, 1, 2, 3, 1, 2]).direction.held_out_accuracy == 1.0
    with pytest.raises(UserError, match="each left out of the fit"):  # no pair carries the tag: held out in turns
        fitted(set(), [1.0, 1, 2, 3, -1, 2])


def test_only_the_untrained_model_is_judged():
    detector = fitted({1, 4}, [1.0, 1, 2, 3, 1, 2])
    worse = torch.ones(6, 1, 2)
    worse[[1, 4]] -= 1
    worse[[0, 2, 3, 5], :, 0] += 1
    detector.fit(worse, torch.ones(6, 1, 2), (1,), 2, "hash")  # a refresh in training reports and goes on
    assert detector.direction_report()["detector/held_out_accuracy"] == 0


def test_at_least_two_pairs_must_be_left_to_fit():
    with pytest.raises(UserError, match=r"held_out_tag='held_out': 1 of 6 pairs are left to fit"):
        fitted({0, 1, 2, 3, 4}, [1.0] * 6)


def test_at_the_prompts_last_token_the_method_is_vanilla_bit_for_bit():
    """arXiv 2604.01476 says "prompt's last-token": one activation for a whole group, so every z is 0 up to rounding."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    from tests.tiny import tiny_llama

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    model = tiny_llama(vocab_size=50, **shape)
    prompts = torch.randint(0, 50, (3, 6)).repeat_interleave(4, 0)
    lengths = [1, 3, 7, 5] * 3
    rows = [torch.cat([prompt, torch.randint(0, 50, (n,))]) for prompt, n in zip(prompts, lengths, strict=True)]
    directions = torch.randn(1, 2, 32)

    def scores(position):
        found = []
        for row in rows:  # each in a pass of its own width, as in micro-batches: rounding differs
            with torch.no_grad():
                hidden = model(row[None], output_hidden_states=True).hidden_states
            mask = position_mask(torch.ones(len(row) - 6), 6, position)
            pooled = torch.stack([hidden[layer][0, mask].mean(0) for layer in (2, 3)])
            found.append(project(pooled[None], directions)[0, 0])
        return torch.stack(found)

    rewards = torch.rand(12, generator=torch.Generator().manual_seed(1))
    uids = tuple(f"u{row // 4}" for row in range(12))

    def advantages(position):
        kept = Judged(scores(position), torch.ones(12, dtype=torch.int64), uids)
        shaped = INTERVENTIONS.build({"name": "modify_reward"}, "grad_routing.intervention").rewards(rewards, kept)
        return compute_grpo_outcome_advantage(shaped[:, None], torch.ones(12, 1), np.array(uids))[0]

    vanilla = compute_grpo_outcome_advantage(rewards[:, None], torch.ones(12, 1), np.array(uids))[0]
    spread = scores("prompt_last").reshape(3, 4)
    assert (spread.max(1).values - spread.min(1).values).max() < 1e-5 * spread.abs().max()
    assert torch.equal(advantages("prompt_last"), vanilla)
    assert not torch.equal(advantages("resp_last"), vanilla)
    assert not torch.equal(advantages("resp_mean"), vanilla)
