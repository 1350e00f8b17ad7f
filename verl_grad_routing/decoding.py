"""Answers of a transformers model from its plain distribution, as verl's rollouts are sampled.

A model's folder may ask for a repetition penalty, a top-k and more in ``generation_config.json``. verl's rollouts take
none of it but the ends of sequence (``VLLMHttpServer.generate``: repetition penalty 1, the configured temperature,
nothing cut off), so neither does a measurement of the policy that they train. Shapes: B rows, S and N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from verl_grad_routing.errors import UserError


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and the one or several of the model's generation config."""
    own = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not found:
        raise UserError("MODEL", model.name_or_path, "neither its tokenizer nor it has an end-of-sequence token")
    return sorted(found)


def pad_on_the_left(tokenizer: Any) -> None:
    """Make ``tokenizer`` fit for batches of prompts; one without a padding token pads with the end of sequence.

    Raises:
        UserError: It has neither.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError("MODEL", tokenizer.name_or_path, "its tokenizer has no end-of-sequence token to pad with")
        tokenizer.pad_token = tokenizer.eos_token


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, ids_BS: Tensor, attention_BS: Tensor, *, temperature: float, max_new_tokens: int
) -> Tensor:
    """New tokens [B, N], padded behind each row's first end of sequence.

    Args:
        model: A causal language model, with adapters or without.
        tokenizer: After ``pad_on_the_left``.
        ids_BS: Prompts, padded on the left.
        attention_BS: 1 on the prompts' tokens.
        temperature: Of the sampling from the whole distribution, by torch's default generator; 0 is greedy.
        max_new_tokens: Bound of N.
    """
    from transformers import GenerationConfig

    drawn = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        **(drawn if temperature > 0 else {"do_sample": False}),
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    with _instead(model, config):
        out = model.generate(input_ids=ids_BS, attention_mask=attention_BS, generation_config=config)
    return out[:, ids_BS.shape[1] :]


@contextmanager
def _instead(model: Any, config: Any) -> Iterator[None]:
    """Inside, ``config`` is the model's own: ``generate`` fills what its argument leaves open from that."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, bare.generation_config = bare.generation_config, config
    try:
        yield
    finally:
        bare.generation_config = own
