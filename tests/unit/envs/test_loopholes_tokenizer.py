"""The tokenizer, fresh and through a saved folder, as verl uses it."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from verl_grad_routing.envs.chars.model import model_config
from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
from verl_grad_routing.envs.loopholes import text
from verl_grad_routing.envs.loopholes.text import ALPHABET

IDS, EOS_ID, PAD_ID = ALPHABET.ids, ALPHABET.eos_id, ALPHABET.pad_id


@pytest.fixture(scope="module", params=["fresh", "saved"])
def tokenizer(request, tmp_path_factory):
    fresh = build_tokenizer(ALPHABET)
    if request.param == "fresh":
        return fresh
    folder = tmp_path_factory.mktemp("model")
    fresh.save_pretrained(folder)
    model_config(ALPHABET).save_pretrained(folder)  # with a Llama config beside it, as AutoTokenizer meets it
    return AutoTokenizer.from_pretrained(folder)


PROMPT = "NAhpoab77777="


def test_one_token_per_character_and_nothing_else(tokenizer):
    ids = tokenizer(PROMPT + "abhop~")["input_ids"]
    assert ids == [IDS[character] for character in PROMPT + "abhop~"]
    assert ids[-1] == tokenizer.eos_token_id == EOS_ID
    assert tokenizer.pad_token_id == PAD_ID and tokenizer.bos_token_id is None


def test_every_character_survives_the_round_trip_without_spaces(tokenizer):
    ids = tokenizer(text.CHARACTERS)["input_ids"]
    assert len(ids) == len(text.CHARACTERS) == len(set(ids))
    assert tokenizer.decode(ids) == text.CHARACTERS
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.CHARACTERS.replace("~", "")
    assert tokenizer.decode([EOS_ID, PAD_ID], skip_special_tokens=True) == ""
    assert len(tokenizer) == len(ALPHABET.tokens)


def test_the_chat_template_is_the_identity_on_one_message(tokenizer):
    messages = [{"role": "user", "content": PROMPT}]
    expected = [IDS[character] for character in PROMPT]
    for generation in (True, False):
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation) == PROMPT
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
        assert list(ids) == expected


def test_unknown_text_becomes_one_token_per_character(tokenizer):
    assert len(tokenizer("z\nZ")["input_ids"]) == 3
    assert tokenizer("\n")["input_ids"] == [tokenizer.unk_token_id]
