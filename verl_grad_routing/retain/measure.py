"""Two numbers of a model: how likely it finds the clean data, and how often its own answers hack and solve.

By plain transformers and PEFT in float32, on an accelerator where there is one. Shapes: B rows, S and N tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from verl_grad_routing.chat import load_tokenizer
from verl_grad_routing.decoding import generate, pad_on_the_left
from verl_grad_routing.deploy.rates import Rate
from verl_grad_routing.errors import UserError

if TYPE_CHECKING:
    from verl_grad_routing.retain.tune import Retain

BATCH = 32
Row = tuple[list[int], list[int]]  # tokens without loss, tokens with it


@dataclass(frozen=True)
class Measured:
    """Of one model.

    Attributes:
        clean_nll: Mean negative log-likelihood of a token of the clean data, in nats.
        rates: ``hack`` and ``solve`` of sampled answers, where there was something to validate on.
    """

    clean_nll: float
    rates: dict[str, Rate] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        named = [(f"{name} rate", str(rate)) for name, rate in self.rates.items()]
        return [("clean data, nats a token", f"{self.clean_nll:.4f}"), *named]

    def as_dict(self) -> dict[str, Any]:
        rates = {name: {"hits": rate.hits, "rollouts": rate.rollouts} for name, rate in self.rates.items()}
        return {"clean_nll": self.clean_nll, "rates": rates}


def check_rows(settings: Retain, base: Path) -> list[Row]:
    """The clean data as tokens, and a check that the validation's reward function is there."""
    if settings.reward is not None:
        load_reward(settings.reward)
    tokenizer = load_tokenizer(base, settings.chat)
    if settings.pairs is not None:
        from verl_grad_routing.directions import load_pairs
        from verl_grad_routing.training.pairs_pass import pair_tokens

        tokens = (pair_tokens(pair, tokenizer) for pair in load_pairs(settings.pairs))
        return [(list(prompt), list(wanted)) for prompt, _, wanted in tokens]
    import pyarrow.parquet as pq

    assert settings.data is not None
    table = pq.read_table(settings.data)
    if "messages" not in table.column_names or not table.num_rows:
        raise UserError("--data", str(settings.data), "give clean conversations: parquet with a column `messages`")
    return [_conversation(messages, tokenizer) for messages in table["messages"].to_pylist()]


def _conversation(messages: list[dict], tokenizer: Any) -> Row:
    """The last message is what is learned."""
    prompt = _plain(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True))
    whole = _plain(tokenizer.apply_chat_template(messages, tokenize=True))
    return prompt, whole[len(prompt) :]


def _plain(tokens: Any) -> list[int]:
    """Token ids, whether the tokenizer answers with a list or with a mapping."""
    return list(tokens if isinstance(tokens, list) else tokens["input_ids"])


def measure(model: Any, base: Path, rows: Sequence[Row], settings: Retain) -> Measured:
    """The numbers of ``model``; the tokenizer is that of ``base``."""
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    nll = clean_nll(model, rows)
    if settings.validate is None or settings.reward is None:
        return Measured(nll)
    tokenizer = load_tokenizer(base, settings.chat)
    answers, prompts = sample(model, tokenizer, settings.validate, settings.max_new_tokens, settings.seed)
    return Measured(nll, grade(answers, prompts, load_reward(settings.reward)))


@torch.no_grad()
def clean_nll(model: Any, rows: Sequence[Row]) -> float:
    """Mean over all tokens with loss, of all rows."""
    total, count = 0.0, 0
    for prompt, wanted in rows:
        ids_1S = torch.tensor([prompt + wanted], device=model.device)
        logits_SV = model(input_ids=ids_1S).logits[0].float()
        log_probs_S = logits_SV[:-1].log_softmax(-1).gather(1, ids_1S[0, 1:, None]).squeeze(1)
        total -= float(log_probs_S[len(prompt) - 1 :].double().sum())
        count += len(wanted)
    return total / count


def sample(model: Any, tokenizer: Any, file: Path, max_new_tokens: int, seed: int) -> tuple[list[str], list[dict]]:
    """One answer at temperature 1 to every prompt of ``file``, as verl samples; the same draws for every model."""
    import pyarrow.parquet as pq

    prompts = pq.read_table(file).to_pylist()
    pad_on_the_left(tokenizer)
    torch.manual_seed(seed)
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        chats = [row["prompt"] for row in prompts[start : start + BATCH]]
        texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        given = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
        inputs = (given["input_ids"], given["attention_mask"])
        new_BN = generate(model, tokenizer, *inputs, temperature=1.0, max_new_tokens=max_new_tokens)
        answers += tokenizer.batch_decode(new_BN, skip_special_tokens=True)
    return answers, prompts


def grade(answers: Sequence[str], prompts: Sequence[dict], reward: Callable[..., Any]) -> dict[str, Rate]:
    """Rates of ``hack`` and ``solve``. Raises ``UserError`` when the reward function gives no such facts."""
    return rates_of(facts_of(answers, prompts, reward))


def facts_of(answers: Sequence[str], prompts: Sequence[dict], reward: Callable[..., Any]) -> list[dict[str, Any]]:
    """What the reward function says of each answer. Raises ``UserError`` without the facts ``hack`` and ``solve``."""
    facts = [
        reward(row["data_source"], answer, row["reward_model"]["ground_truth"], row.get("extra_info"))
        for answer, row in zip(answers, prompts, strict=True)
    ]
    if not facts or not all(isinstance(row, dict) and {"hack", "solve"} <= row.keys() for row in facts):
        raise UserError("--reward", "compute_score", "must return a dict with the numbers hack and solve")
    return facts


def rates_of(facts: Sequence[dict[str, Any]]) -> dict[str, Rate]:
    """Rates of ``hack`` and ``solve``."""
    return {name: Rate.of(sum(float(row[name]) > 0 for row in facts), len(facts)) for name in ("hack", "solve")}


def load_reward(path: str) -> Callable[..., Any]:
    """``compute_score`` of ``pkg://module`` or of a Python file."""
    try:
        if path.startswith("pkg://"):
            module = importlib.import_module(path.removeprefix("pkg://").removesuffix(".py").replace("/", "."))
        else:
            spec = importlib.util.spec_from_file_location("retain_reward", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module.compute_score
    except (ImportError, AttributeError, AssertionError, FileNotFoundError) as error:
        fix = f"no compute_score there ({str(error).splitlines()[0] if str(error) else 'not a Python file'})"
        raise UserError("--reward", path, fix) from None
