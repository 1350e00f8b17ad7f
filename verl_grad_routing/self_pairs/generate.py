"""A model that answers prompts: transformers' own sampling, batched, from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from verl_grad_routing.chat import Switches, load_tokenizer
from verl_grad_routing.decoding import ends_of, generate, pad_on_the_left
from verl_grad_routing.errors import UserError
from verl_grad_routing.self_pairs.framings import Prompt


class Answer(NamedTuple):
    """Text without special tokens, its number of tokens (the end included), and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


class Writer:
    """A Hugging Face model, or an adapter folder such as ``vgr export`` writes, that samples answers.

    Args:
        model: Its folder.
        max_new_tokens: Limit of an answer.
        temperature: Of the sampling; nothing is cut off the distribution.
        seed: The answers to a sequence of calls are a function of it, on one machine.
        device: Where it runs; an accelerator where there is one.
        chat: Switches of its chat template.

    Raises:
        UserError: No such folder, no model in it, or no token that ends an answer.
    """

    def __init__(
        self,
        model: Path,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        device: str | None = None,
        chat: Switches | None = None,
    ):
        self.limit, self.temperature = max_new_tokens, temperature
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not model.is_dir():
            raise UserError("MODEL", str(model), "no such folder; give a Hugging Face model or an exported adapter")
        try:
            self.tokenizer: Any = load_tokenizer(model, chat)
            with _quiet():
                self.model: Any = _load(model).eval().to(self.device)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError("MODEL", str(model), f"no model that transformers loads: {reason}") from None
        pad_on_the_left(self.tokenizer)
        self.ends = set(ends_of(self.model, self.tokenizer))
        self._seed = seed

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """One sampled answer to each prompt."""
        ids = [{"input_ids": self._ids(prompt)} for prompt in prompts]
        inputs = self.tokenizer.pad(ids, return_tensors="pt").to(self.device)
        devices = [torch.cuda.current_device()] if self.device.startswith("cuda") else []
        how = {"temperature": self.temperature, "max_new_tokens": self.limit}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed)
            self._seed += 1
            made_BN = generate(self.model, self.tokenizer, inputs["input_ids"], inputs["attention_mask"], **how)
        return [self._read(row.tolist()) for row in made_BN]

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        chat = [{"role": message.role, "content": message.content} for message in prompt]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)

    def _read(self, ids: list[int]) -> Answer:
        end = next((index for index, token in enumerate(ids) if token in self.ends), None)
        own = ids if end is None else ids[: end + 1]
        return Answer(self.tokenizer.decode(own, skip_special_tokens=True), len(own), end is not None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load(folder: Path) -> Any:
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
