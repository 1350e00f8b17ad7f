"""Contrastive pairs through the model: texts to rows that verl's engine takes, pooled activations back.

Shapes: P pairs, L layers, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_grad_routing.bottleneck import Bottleneck
from verl_grad_routing.directions import Pair, PairSet
from verl_grad_routing.errors import UserError
from verl_grad_routing.training.probe import Pool


def pair_tokens(pair: Pair, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a pair's prompt, unwanted and wanted side.

    A chat prompt goes through the chat template, as rollouts do; a plain prompt is tokenised as it stands. Sides are
    tokenised alone and followed by the end-of-sequence token unless they bring it, so they end like rollouts.
    """
    if pair.chat:
        messages = pair.chat
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        prompt = tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
    sides = []
    for side in (pair.unwanted, pair.wanted):
        ids = tokenizer(side, add_special_tokens=False)["input_ids"]
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        sides.append(list(ids))
    if not prompt or sides[0] == sides[1]:
        raise UserError(f"pair {pair.id}", pair.unwanted, "both sides give the same tokens, or the prompt gives none")
    return list(prompt), sides[0], sides[1]


def pair_rows(pairs: PairSet, tokenizer: Any, count: int) -> TensorDict:
    """``count`` rows for verl's engine: all unwanted sides, then all wanted sides, then repeats of them."""
    tokens = [pair_tokens(pair, tokenizer) for pair in pairs]
    texts = [(prompt, side) for which in (1, 2) for prompt, side in [(t[0], t[which]) for t in tokens]]
    texts = [texts[i % len(texts)] for i in range(count)]

    def jagged(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    masks = jagged([[1] * len(side) for _, side in texts])
    return TensorDict(
        {
            "input_ids": jagged([[*prompt, *side] for prompt, side in texts]),
            "position_ids": jagged([list(range(len(prompt) + len(side))) for prompt, side in texts]),
            "prompts": jagged([prompt for prompt, _ in texts]),
            "responses": jagged([side for _, side in texts]),
            "response_mask": masks,
            "loss_mask": masks,
        },
        batch_size=[len(texts)],
    )


def pool_pairs(
    worker_group: Any,
    pairs: PairSet,
    tokenizer: Any,
    layers: tuple[int, ...],
    position: str,
    score_pass: str,
    rows: int,
    batching: dict[str, int],
    bottleneck: Bottleneck | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled activations of the pairs' unwanted and wanted sides, ``[P, L, d]`` each, under the scoring pass's model.

    With a ``bottleneck`` its coordinates: L modules, d its rank.

    Args:
        position: Which tokens are pooled, one of ``directions.POSITIONS``.
        score_pass: ``reference`` (adapters off), ``policy`` or ``ablated``.
        rows: At least 2 P, and what ranks and micro-batches divide.
        batching: The micro-batch setting that goes with ``rows``.
    """
    data = pair_rows(pairs, tokenizer, rows)
    tu.assign_non_tensor(
        data, probe=Pool(layers, position, bottleneck), compute_loss=False, calculate_entropy=False, temperature=1.0
    )
    tu.assign_non_tensor(
        data, no_lora_adapter=score_pass == "reference", ablate_quarantine=score_pass == "ablated", **batching
    )
    output = worker_group.pool_activations(data)
    pooled = output["activation_pooled"]
    pooled = (pooled.to_padded_tensor(0.0) if pooled.is_nested else pooled)[: 2 * len(pairs)]
    width = pooled.shape[1] // len(layers) if bottleneck is None else bottleneck.rank
    pooled_PLd = pooled.reshape(2 * len(pairs), -1, width)
    return pooled_PLd[: len(pairs)], pooled_PLd[len(pairs) :]
