"""A character-level tokenizer that plain transformers, verl and vLLM load from the model folder."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl_grad_routing.envs.chars.alphabet import CONTEXT, PAD, UNKNOWN, Alphabet

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Messages run together: one user message becomes exactly its content, with nothing before or after it."""


def build_tokenizer(alphabet: Alphabet) -> PreTrainedTokenizerFast:
    """One token per character, no BOS, ``alphabet.eos`` as EOS; any other character (newline) is one ``<unk>``."""
    backend = Tokenizer(models.WordLevel(vocab=alphabet.ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[attr-defined]
    backend.decoder = decoders.Fuse()  # type: ignore[attr-defined]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=alphabet.eos,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
