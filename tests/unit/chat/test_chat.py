"""Switches of a chat template reach whatever renders chats, as verl gives them to its rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from omegaconf import OmegaConf

from verl_grad_routing.chat import described, load_tokenizer, parse_switches, sft_overrides, with_switches
from verl_grad_routing.directions.pairs import Message, Pair
from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
from verl_grad_routing.envs.loopholes.text import ALPHABET
from verl_grad_routing.errors import UserError

pytestmark = pytest.mark.timeout(180)

# a prompt ends in "=" by itself, and in "=~" with `enable_thinking: false`, as Qwen3's ends in an empty thought
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% if enable_thinking is defined and enable_thinking is false %}~{% endif %}"
    "{% endif %}"
)
OFF = {"enable_thinking": False}
CHAT = [{"role": "user", "content": "NAab"}]


@pytest.fixture
def tokenizer() -> Any:
    made = build_tokenizer(ALPHABET)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    from verl_grad_routing.envs.chars.model import model_config

    tokenizer.save_pretrained(tmp_path / "model")
    model_config(ALPHABET).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def text(tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)


def test_without_switches_it_is_the_tokenizer_itself(tokenizer: Any) -> None:
    assert with_switches(tokenizer, {}) is tokenizer and with_switches(tokenizer, None) is tokenizer


def test_switches_bind_a_copy_and_a_callers_own_win(tokenizer: Any) -> None:
    bound = with_switches(tokenizer, OmegaConf.create(OFF))
    assert (text(bound), text(tokenizer)) == ("NAab=~", "NAab=")
    own = bound.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert own == "NAab="
    assert bound("ab")["input_ids"] == tokenizer("ab")["input_ids"]


def test_a_switch_that_the_template_does_not_read_is_refused(folder: Path) -> None:
    assert text(load_tokenizer(folder, OFF)) == "NAab=~"
    with pytest.raises(UserError, match=r"--chat='enable_thinkin'.*does not read it"):
        load_tokenizer(folder, {"enable_thinkin": False})


def test_settings_of_the_command_line() -> None:
    given = [
        "enable_thinking=false",
        "effort=high",
        "a=off",
        "day=2024-07-26",
        "t=1e-3",
        "n=011",
        "s='it is'",
        "e=null",
    ]
    assert parse_switches(given) == {
        "enable_thinking": False,
        "effort": "high",
        "a": "off",
        "day": "2024-07-26",
        "t": 0.001,
        "n": "011",
        "s": "it is",
        "e": None,
    }
    assert parse_switches(None) == {}
    for bad in ("enable_thinking", "=false", "a b=1", "a=[1", "a=[1]", "a={b: 1}", "+a=1", "a.b=1", "a='x\\\\y'"):
        with pytest.raises(UserError, match="write it as key=value"):
            parse_switches([bad])


def test_verls_sft_trainer_reads_the_overrides() -> None:
    switches = {"enable_thinking": False, "effort": "it's 'high', é", "t": 1e-07, "n": "011", "e": None}
    given = sft_overrides(switches)
    assert given[0] == "+data.apply_chat_template_kwargs.enable_thinking=false"
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        data = compose("sft_trainer_engine", given).data
    assert OmegaConf.to_container(data.apply_chat_template_kwargs) == switches


# ---- what renders chats ----


def test_pairs_of_a_run(tokenizer: Any) -> None:
    from verl_grad_routing.training.pairs_pass import pair_tokens
    from verl_grad_routing.training.trainer.core import Core

    trainer: Any = SimpleNamespace(tokenizer=tokenizer, config=OmegaConf.create({"data": {}}))
    assert Core.chat_tokenizer.fget(trainer) is tokenizer  # type: ignore[attr-defined]
    trainer.config = OmegaConf.create({"data": {"apply_chat_template_kwargs": OFF}})
    pair = Pair("one", (Message("user", "NAab"),), "hh", "ab")
    prompt, _, _ = pair_tokens(pair, Core.chat_tokenizer.fget(trainer))  # type: ignore[attr-defined]
    assert tokenizer.decode(prompt) == "NAab=~"


def test_the_request_for_a_confession(tokenizer: Any) -> None:
    from verl_grad_routing.confessions import ConfessionsConfig, request_tokens

    config = ConfessionsConfig(message="NA", role="user")
    tokenizer.chat_template = TEMPLATE  # the answer itself is spelled in letters that the alphabet lacks
    bound = with_switches(tokenizer, OFF)
    assert tokenizer.decode(request_tokens(bound, config)) == "NA=~"


def test_clean_sides_of_a_fine_tune(tokenizer: Any, tmp_path: Path) -> None:
    from verl_grad_routing.warm_up.data import CleanSides

    rows = [{"id": name, "prompt": CHAT, "unwanted": "hh~", "wanted": f"{name}~"} for name in "ab"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"pad_mode": "no_padding", "max_length": 64, "apply_chat_template_kwargs": OFF}
    found = CleanSides(str(tmp_path / "pairs.jsonl"), tokenizer, OmegaConf.create(settings))
    assert tokenizer.decode(found[0]["input_ids"]) == "NAab=~a~"


def test_labelled_rollouts_and_questions(folder: Path) -> None:
    from verl_grad_routing.probes.rollouts import prompt_tokens
    from verl_grad_routing.self_report.question import Question

    bound = load_tokenizer(folder, OFF)
    assert bound.decode(prompt_tokens(CHAT, bound)) == "NAab=~"
    assert bound.decode(Question("?", "S", "H").tokens(CHAT, "ab", bound)) == "NAabab?=~"


def test_settings_hand_their_switches_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_grad_routing.retain import Retain
    from verl_grad_routing.self_pairs.generate import Writer
    from verl_grad_routing.warm_up import WarmUp

    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"id": n, "prompt": "a", "unwanted": n, "wanted": "x"}) for n in "bc")
    )
    training = Retain(tmp_path, str(tmp_path / "pairs.jsonl"), chat=OFF).training(folder, ())
    assert training.chat == OFF and sft_overrides(OFF)[0] in training.arguments(tmp_path)
    with pytest.raises(UserError, match=r"--chat=.*goes with --pairs"):
        WarmUp(folder, data=folder / "config.json", chat=OFF)
    with pytest.raises(UserError, match=r"--chat='thinking'.*does not read it"):
        Writer(folder, 4, 1.0, 0, chat={"thinking": False})


def test_what_is_made_with_switches_says_so() -> None:
    assert described({"b": False, "a": "x"}) == {"chat": '{"a": "x", "b": false}'}
    assert described({}) == described(None) == {}


def test_every_command_that_renders_chats_has_the_option() -> None:
    from verl_grad_routing.cli import app

    found, waiting = set(), [("vgr", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        waiting += [(f"{name} {key}", one) for key, one in getattr(command, "commands", {}).items()]
        if any(parameter.name == "chat" for parameter in command.params):
            found.add(name.removeprefix("vgr "))
    assert found == {
        "contrast", "interrogate", "pairs", "probe fit", "relearn", "retain", "rft", "self-report train", "warm-up"
    }  # fmt: skip
