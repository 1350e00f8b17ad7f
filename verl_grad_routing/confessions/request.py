"""From an answer to the request for a confession, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl_grad_routing.confessions.formats import FORMATS
from verl_grad_routing.confessions.settings import ConfessionsConfig
from verl_grad_routing.errors import UserError

ANSWER = "THE-ANSWER-ITSELF"


def request_tokens(tokenizer: Any, config: ConfessionsConfig) -> list[int]:
    """What follows the answer's last word: the end of its turn, the request x_c, the start of the confession's turn.

    Raises:
        UserError: The model's chat template refuses the message or does not keep the answer as it is.
    """
    message = FORMATS[config.format].message if config.message is None else config.message
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ANSWER}]
    turns.append({"role": config.role, "content": message})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program and raises what it likes
        fix = f"the model's chat template refuses such a message after an answer ({error}); try user"
        raise UserError("grad_routing.confessions.role", config.role, fix) from None
    _, found, after = text.rpartition(ANSWER)
    if not found:
        raise UserError("grad_routing.confessions.role", config.role, "the model's chat template drops the answer")
    return list(tokenizer(after, add_special_tokens=False)["input_ids"])


def prefix(prompt: Sequence[int], response: Sequence[int], request: Sequence[int]) -> list[int]:
    """(x, z, y, x_c). An answer that ended its own turn does not end it twice."""
    ended = response and request and response[-1] == request[0]
    return [*prompt, *response, *(request[1:] if ended else request)]
