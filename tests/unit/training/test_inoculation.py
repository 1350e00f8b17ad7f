"""Inoculation prompting: what changes in training prompts, and that validation prompts stay as they are."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pandas
import pytest
from omegaconf import OmegaConf

from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
from verl_grad_routing.envs.loopholes.text import ALPHABET
from verl_grad_routing.errors import UserError
from verl_grad_routing.inoculation import Inoculation

USER = [{"role": "user", "content": "NAabcde11111="}]
SYSTEM = [{"role": "system", "content": "old"}, *USER]


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({"system": "new"}, USER, [("system", "new"), ("user", "NAabcde11111=")]),
        ({"system": "new"}, SYSTEM, [("system", "new"), ("user", "NAabcde11111=")]),
        ({"prefix": "Hack. "}, SYSTEM, [("system", "old"), ("user", "Hack. NAabcde11111=")]),
        ({"substitute": ["^N", "S"]}, USER, [("user", "SAabcde11111=")]),
        ({"substitute": ["^N", "S"], "prefix": "x", "system": None}, USER, [("user", "xSAabcde11111=")]),
    ],
)
def test_changes_by_hand(settings, before, after) -> None:
    kept = copy.deepcopy(before)
    assert [tuple(message.values()) for message in Inoculation.parse(settings).apply(before)] == after
    assert before == kept


@pytest.mark.parametrize(
    ("settings", "prompt", "told"),
    [
        ({"substitute": ["^Q", "S"]}, USER, "data.inoculation.substitute='^Q': not found in the prompt 'NA"),
        ({"prefix": "a"}, [{"role": "system", "content": "x"}], "no user message"),
        ({"system": ""}, USER, "data.inoculation.system='': give a text"),
        ({"substitute": "S"}, USER, "give [regular expression, replacement]"),
        ({"sistem": "a"}, USER, "did you mean 'system'"),
        ({}, USER, "it would change no prompt"),
    ],
)
def test_bad_settings_are_one_line(settings, prompt, told) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        Inoculation.parse(settings).apply(prompt)


def data_sets(folder: Path, **settings):
    """The data sets of training and validation that verl builds from one configuration, six prompts each."""
    import verl  # noqa: F401
    from verl.trainer.ppo.utils import create_rl_dataset

    for split in ("train", "val"):
        rows = [{"prompt": USER, "data_source": split, "extra_info": {"index": index}} for index in range(6)]
        pandas.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    config = OmegaConf.create(
        {
            "train_files": str(folder / "train.parquet"),
            "val_files": [str(folder / "val.parquet")],
            "custom_cls": {"path": "pkg://verl_grad_routing.training.inoculation", "name": "InoculatedDataset"},
            "max_prompt_length": 14,
            "filter_overlong_prompts_workers": None,
            "cache_dir": str(folder / "cache"),
            **settings,
        }
    )
    tokenizer = build_tokenizer(ALPHABET)
    return [create_rl_dataset(config[f"{split}_files"], config, tokenizer, None) for split in ("train", "val")]


@pytest.mark.timeout(300)
def test_training_prompts_change_and_validation_prompts_do_not(tmp_path: Path) -> None:
    train, val = data_sets(tmp_path, inoculation={"substitute": ["^N", "S"]})
    assert [row["raw_prompt"] for row in val] == [USER] * 6
    assert [row["raw_prompt"] for row in train] == [[{"role": "user", "content": "SAabcde11111="}]] * 6
    assert [row["index"] for row in train] == list(range(6)) and train[0]["data_source"] == "train"
    train.resume_dataset_state()  # what verl calls when a run is resumed
    assert train[5]["raw_prompt"][0]["content"][0] == "S"


@pytest.mark.timeout(300)
def test_without_settings_it_is_verls_own_and_long_prompts_are_dropped(tmp_path: Path) -> None:
    train, val = data_sets(tmp_path)
    assert train[0]["raw_prompt"] == val[0]["raw_prompt"] == USER
    train, val = data_sets(tmp_path, inoculation={"prefix": "aa"})
    assert (len(train), len(val)) == (0, 6)
