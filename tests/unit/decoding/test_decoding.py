"""What a model's folder asks of its sampling changes no sampled answer: they are of the policy that verl trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from verl_grad_routing.decoding import ends_of, generate, pad_on_the_left
from verl_grad_routing.directions.pairs import Message
from verl_grad_routing.envs.chars.model import new_model, save
from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
from verl_grad_routing.envs.loopholes.settings import Settings
from verl_grad_routing.envs.loopholes.text import ALPHABET, LoopholesWorld
from verl_grad_routing.errors import UserError

pytestmark = pytest.mark.timeout(180)

LENGTH = 8
ASKS = {
    "do_sample": True,
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "top_k": 1,
    "top_p": 0.5,
    "temperature": 0.1,
    "min_p": 0.9,
    "suppress_tokens": [5, 6, 7, 8],
    "min_new_tokens": LENGTH,
}
"""What some published models ask for, and what transformers fills in where an argument leaves it open."""


def rows() -> list[dict[str, Any]]:
    world = LoopholesWorld(Settings())
    return [world.row(index, "train", task) for index, task in enumerate(world.tasks()["train"][:12])]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), file)
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights, by themselves and with ``ASKS`` in ``generation_config.json``."""
    plain, asking = (tmp_path_factory.mktemp(name) for name in ("plain", "asking"))
    for folder in (plain, asking):
        save(sharp(), build_tokenizer(ALPHABET), folder)
    config = GenerationConfig.from_pretrained(plain)
    config.update(**ASKS)
    config.save_pretrained(asking)
    return plain, asking


def sharp() -> Any:
    """An untrained model with logits of order one."""
    model = new_model(ALPHABET, 0)
    with torch.no_grad():
        model.model.norm.weight.mul_(5)
    return model


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def measured(folder: Path, data: Path) -> Any:
    from verl_grad_routing.retain.measure import sample

    return sample(*load(folder), data, LENGTH, 3)[0]


def rejected(folder: Path, data: Path, temperature: float = 1.0) -> Any:
    from verl_grad_routing.rejection import Rft
    from verl_grad_routing.rejection.sample import sample

    return sample(Rft(folder, data, max_tokens=LENGTH, temperature=temperature, detector={"rules": ["^a"]}))


def asked(folder: Path, data: Path, temperature: float = 1.0) -> Any:
    from verl_grad_routing.self_report.interrogate import answer_all

    verdict = SimpleNamespace(hack=False, loophole="none")
    grader = SimpleNamespace(grade=lambda text, truth, row: verdict, known=())
    return answer_all(*load(folder), grader, rows(), max_new_tokens=LENGTH, temperature=temperature, seed=3)


def written(folder: Path, data: Path) -> Any:
    from verl_grad_routing.self_pairs.generate import Writer

    return Writer(folder, LENGTH, 1.0, 3, "cpu").answer(
        [(Message("user", row["prompt"][0]["content"]),) for row in rows()]
    )


def greedily(sampler: Callable[..., Any]) -> Callable[..., Any]:
    return lambda folder, data: sampler(folder, data, 0.0)


@pytest.mark.parametrize(
    "sampler",
    [measured, rejected, asked, written, greedily(rejected), greedily(asked)],
    ids=["retain and relearn", "rft", "interrogate", "pairs write", "rft greedy", "interrogate greedy"],
)
def test_what_a_folder_asks_of_its_sampling_is_not_done(folders: tuple[Path, Path], data: Path, sampler: Any) -> None:
    plain, asking = (sampler(folder, data) for folder in folders)
    assert plain == asking and len(plain) == 12


def prompts(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given = tokenizer([row["prompt"][0]["content"] for row in rows()], return_tensors="pt")
    return given["input_ids"], given["attention_mask"]


@torch.no_grad()
def by_hand(model: Any, ids_BS: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draws from the softmax of the logits over ``temperature``, one token after the other."""
    start = ids_BS.shape[1]
    for _ in range(LENGTH):
        logits_BV = model(input_ids=ids_BS).logits[:, -1] / temperature
        ids_BS = torch.cat((ids_BS, torch.multinomial(logits_BV.softmax(-1), 1)), dim=1)
    return ids_BS[:, start:]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_are_from_the_whole_softmax(folders: tuple[Path, Path], temperature: float) -> None:
    model, tokenizer = load(folders[1])
    inputs = prompts(tokenizer)
    torch.manual_seed(0)
    found_BN = generate(model, tokenizer, *inputs, temperature=temperature, max_new_tokens=LENGTH)
    torch.manual_seed(0)
    ended = torch.zeros(len(found_BN), dtype=torch.bool)
    for found, drawn in zip(found_BN.T, by_hand(model, inputs[0], temperature).T, strict=True):
        assert torch.equal(found[~ended], drawn[~ended]) and (found[ended] == ALPHABET.pad_id).all()
        ended |= drawn == ALPHABET.eos_id


@pytest.mark.parametrize("adapters", [False, True])
def test_the_model_keeps_what_it_asks_for(folders: tuple[Path, Path], adapters: bool) -> None:
    """With adapters too, whose ``generate`` copies a generation config into the model below."""
    from peft import LoraConfig, get_peft_model

    bare, tokenizer = load(folders[1])
    own = bare.generation_config
    model = get_peft_model(bare, LoraConfig(r=2, target_modules=["q_proj"])) if adapters else bare
    torch.manual_seed(0)
    found = generate(model, tokenizer, *prompts(tokenizer), temperature=1.0, max_new_tokens=LENGTH)
    plain, _ = load(folders[0])
    torch.manual_seed(0)
    assert torch.equal(found, generate(plain, tokenizer, *prompts(tokenizer), temperature=1.0, max_new_tokens=LENGTH))
    assert bare.generation_config is own and own.repetition_penalty == 2.0 and model.generation_config is own


def test_several_ends_of_sequence_all_end_an_answer(folders: tuple[Path, Path]) -> None:
    model, tokenizer = load(folders[0])
    listed = [ALPHABET.ids[character] for character in "abcdefgh"]
    model.generation_config.eos_token_id = listed
    assert ends_of(model, tokenizer) == sorted([*listed, ALPHABET.eos_id])
    torch.manual_seed(0)
    found_BN = generate(model, tokenizer, *prompts(tokenizer), temperature=1.0, max_new_tokens=40)
    ends = set()
    for row in found_BN.tolist():
        first = next((place for place, token in enumerate(row) if token in listed), len(row))
        assert set(row[first + 1 :]) <= {ALPHABET.pad_id}
        ends |= set(row[first : first + 1])
    assert len(ends) > 1


def test_a_tokenizer_without_padding_pads_with_the_end(folders: tuple[Path, Path]) -> None:
    model, tokenizer = load(folders[0])
    tokenizer.pad_token = None
    pad_on_the_left(tokenizer)
    assert tokenizer.pad_token_id == ALPHABET.eos_id and tokenizer.padding_side == "left"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token to pad with"):
        pad_on_the_left(tokenizer)
    model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="neither its tokenizer"):
        ends_of(model, tokenizer)
