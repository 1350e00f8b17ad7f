"""Responses of a model to the prompts of a data file, and what the reward function says of them."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from verl_grad_routing.chat import load_tokenizer
from verl_grad_routing.errors import UserError
from verl_grad_routing.rejection.settings import Rft

BATCH = 64  # sequences that transformers generates at once


@dataclass(frozen=True)
class Sample:
    """A response.

    Attributes:
        key: Unique in the run: prompt number and sample number.
        prompt: Tokens, the chat template's.
        response: Tokens, the end of sequence included where there is one.
        prompt_text, response_text: Without special tokens.
        reward: The proxy's.
        facts: Whatever other numbers the reward function returned.
    """

    key: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    prompt_text: str
    response_text: str
    reward: float
    facts: Mapping[str, float]


def sample(settings: Rft) -> list[Sample]:
    """One row for each response, in the order of the data.

    Raises:
        UserError: Bad data, a reward function that is none or returns no number.
    """
    rows = _rows(settings)
    reward = reward_function(settings.reward, rows[0])
    tokenizer = load_tokenizer(settings.model, settings.chat)
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(list(row["prompt"]), add_generation_prompt=True, tokenize=False),
            add_special_tokens=False,
        )["input_ids"]
        for row in rows
    ]
    generate = {"transformers": _by_transformers, "vllm": _by_vllm}[settings.engine]
    responses = generate(settings, tokenizer, [ids for ids in prompts for _ in range(settings.samples)])
    found = []
    for number, response in enumerate(responses):
        row, ids = rows[number // settings.samples], prompts[number // settings.samples]
        text = tokenizer.decode(response, skip_special_tokens=True)
        score, facts = _rewarded(reward, row, text)
        key = f"{number // settings.samples}_{number % settings.samples}"
        shown = tokenizer.decode(ids, skip_special_tokens=True)
        found.append(Sample(key, tuple(ids), tuple(response), shown, text, score, facts))
    return found


def _rows(settings: Rft) -> list[dict[str, Any]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(settings.data)
    missing = {"prompt", "data_source", "reward_model"} - set(table.column_names)
    if missing or table.num_rows == 0:
        what = f"has no column {sorted(missing)[0]!r}" if missing else "has no rows"
        raise UserError("--data", str(settings.data), f"{what}; give parquet in verl's format")
    return list(islice(table.to_pylist(), settings.prompts))


def reward_function(path: str | None, row: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that ``module:function`` names, or that of the environment of ``row``. Raises ``UserError``."""
    from verl_grad_routing.envs import ENVIRONMENTS

    if path is None:
        source = row["data_source"]
        if source not in ENVIRONMENTS:
            raise UserError("--reward", None, f"data_source {source!r} is no environment of ours; give module:function")
        path = ENVIRONMENTS[source].reward_function.removeprefix("pkg://") + ":compute_score"
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError("--reward", path, f"cannot be imported as module:function ({error})") from None
    if not callable(function):
        raise UserError("--reward", path, "must be a function with the signature of verl's reward functions")
    return function


def _rewarded(reward: Callable[..., Any], row: Mapping[str, Any], text: str) -> tuple[float, dict[str, float]]:
    said = reward(
        data_source=row["data_source"],
        solution_str=text,
        ground_truth=row["reward_model"]["ground_truth"],
        extra_info=row.get("extra_info"),
    )
    fields = dict(said) if isinstance(said, Mapping) else {"score": said}
    score = fields.pop("score", None)
    if not isinstance(score, int | float):
        raise UserError("--reward", score, "the reward function must return a number, or a mapping with `score`")
    return float(score), {key: float(value) for key, value in fields.items() if isinstance(value, int | float)}


def _by_transformers(settings: Rft, tokenizer: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    from verl_grad_routing.decoding import ends_of, generate, pad_on_the_left

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model)
    model.to(device).eval()
    torch.manual_seed(settings.seed)
    pad_on_the_left(tokenizer)
    pad, ends = tokenizer.pad_token_id, set(ends_of(model, tokenizer))
    how: dict[str, Any] = {"temperature": settings.temperature, "max_new_tokens": settings.max_tokens}
    responses = []
    for start in range(0, len(prompts), BATCH):
        rows = prompts[start : start + BATCH]
        width = max(map(len, rows))
        ids_BT = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        new_BN = generate(model, tokenizer, ids_BT, mask_BT, **how)
        responses += [_until_end(row, ends) for row in new_BN.tolist()]
    return responses


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first end of sequence; what follows is padding."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]


def _by_vllm(settings: Rft, tokenizer: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    del tokenizer
    engine = LLM(model=str(settings.model), seed=settings.seed)
    how = SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens)
    outputs = engine.generate([{"prompt_token_ids": list(ids)} for ids in prompts], how)
    return [list(output.outputs[0].token_ids) for output in outputs]


def shuffled(values: Sequence[float], seed: int) -> list[float]:
    """A permutation of ``values``: the label-permutation control."""
    drawn = list(values)
    random.Random(f"rft/{seed}").shuffle(drawn)
    return drawn
