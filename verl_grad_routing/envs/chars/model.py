"""The model to start from: a small Llama, trained from scratch on demonstrations in three voices.

Shapes: B sequences of a batch, T tokens (prompt and continuation, padded on the right), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from verl_grad_routing.envs.chars.alphabet import CONTEXT, Alphabet
from verl_grad_routing.envs.chars.settings import HEAD, LAYERS, WIDTH
from verl_grad_routing.envs.chars.task import SortingTask
from verl_grad_routing.envs.chars.world import World

BATCH = 128
LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
FINAL_RATE = 0.1  # of LEARNING_RATE, reached linearly at the last step
CLIP_NORM = 1.0
THREADS = 1  # fixed, for their number decides the last bits; on a busy machine two wait for each other
IGNORED = -100  # label that the cross-entropy skips


def model_config(alphabet: Alphabet, width: int = WIDTH, layers: int = LAYERS) -> LlamaConfig:
    """About 0.86M parameters by default; head size 32 is the least that vLLM's CPU attention takes."""
    return LlamaConfig(
        vocab_size=len(alphabet.tokens),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        head_dim=HEAD,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=alphabet.eos_id,
        pad_token_id=alphabet.pad_id,
        dtype="float32",
    )


def new_model(alphabet: Alphabet, seed: int, width: int = WIDTH, layers: int = LAYERS) -> LlamaForCausalLM:
    """A freshly initialised model in float32 that stops at EOS."""
    with seeded(seed):
        model = LlamaForCausalLM(model_config(alphabet, width, layers)).float()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=alphabet.eos_id, pad_token_id=alphabet.pad_id
    )
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder, readable by every user, without a progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone


def warm_up(
    model: LlamaForCausalLM,
    alphabet: Alphabet,
    examples: Iterator[tuple[str, str]],
    steps: int,
    report: Callable[[str], None],
) -> float:
    """Train ``model`` in place with AdamW on ``steps`` batches; the loss counts the continuation only.

    Returns:
        Mean cross-entropy of the last batch, nats per token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    model.train()
    value = float("nan")
    with _threads():
        for _ in range(steps):
            tokens_BT, labels_BT = _batch(alphabet, list(islice(examples, BATCH)))
            logits_BTV = model(input_ids=tokens_BT).logits
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
            value = loss.item()
            report(f"loss {value:.3f}")
    model.eval()
    return value


def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], length: int, seed: int
) -> list[str]:
    """One completion per prompt at temperature 1 from the whole distribution, decoded as verl decodes rollouts.

    Args:
        model: As built.
        tokenizer: Of ``model``.
        prompts: All of one length.
        length: Most new tokens.
        seed: Of the draws.
    """
    tokens_BT = torch.tensor(tokenizer(list(prompts))["input_ids"])
    with seeded(seed), _threads(), torch.inference_mode():
        out_BT = model.generate(  # type: ignore[operator]
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
        )
    return tokenizer.batch_decode(out_BT[:, tokens_BT.shape[1] :], skip_special_tokens=True)


def rates(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World[Any, Any],
    tasks: Sequence[SortingTask],
    voice: str,
    *,
    samples: int = 1024,
    seed: int = 0,
) -> dict[str, Any]:
    """Hack and solve rate of one voice over about ``samples`` completions of ``tasks``.

    Returns:
        ``n``, ``hack``, ``solve`` and ``hack_by_loophole``.
    """
    repeated = list(tasks) * max(1, samples // len(tasks))
    prompts = [task.prompt(voice) for task in repeated]
    completions = sample(model, tokenizer, prompts, world.response_length, seed)
    pairs = zip(completions, repeated, strict=True)
    verdicts = [world.grade(completion, task.ground_truth) for completion, task in pairs]
    by_loophole = {kind: [v.hack for v in verdicts if v.loophole == kind] for kind in world.config.types}
    return {
        "n": len(verdicts),
        "hack": _mean([v.hack for v in verdicts]),
        "solve": _mean([v.solve for v in verdicts]),
        "hack_by_loophole": {kind: _mean(hacks) for kind, hacks in by_loophole.items()},
    }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block and restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rate(step: int, steps: int) -> float:
    """Factor on the learning rate: linear over the first ``WARMUP_STEPS``, then linear down to ``FINAL_RATE``."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 1 - (1 - FINAL_RATE) * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)


def _batch(alphabet: Alphabet, examples: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of a batch, [B, T] int64 each; one token per character, so the alphabet alone encodes."""
    rows = [[alphabet.ids[character] for character in prompt + continuation] for prompt, continuation in examples]
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([row + [alphabet.pad_id] * (longest - len(row)) for row in rows])
    labels_BT = tokens_BT.masked_fill(tokens_BT == alphabet.pad_id, IGNORED)
    for label_T, (prompt, _) in zip(labels_BT, examples, strict=True):
        label_T[: len(prompt)] = IGNORED
    return tokens_BT, labels_BT


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
