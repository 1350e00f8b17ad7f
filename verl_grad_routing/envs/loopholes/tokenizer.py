"""A character-level tokenizer that plain transformers, verl and vLLM load from the model folder."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl_grad_routing.envs.loopholes.text import CHARACTERS, EOS

PAD, UNKNOWN = "<pad>", "<unk>"
CONTEXT = 128  # positions of the model, far above prompt and response
VOCABULARY = (PAD, UNKNOWN, *CHARACTERS)
IDS = {token: index for index, token in enumerate(VOCABULARY)}
PAD_ID, EOS_ID = IDS[PAD], IDS[EOS]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Messages run together: one user message becomes exactly its content, with nothing before or after it."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, no BOS; ``~`` is EOS; a character outside the vocabulary (newline) is one ``<unk>``."""
    backend = Tokenizer(models.WordLevel(vocab=IDS, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[attr-defined]
    backend.decoder = decoders.Fuse()  # type: ignore[attr-defined]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
