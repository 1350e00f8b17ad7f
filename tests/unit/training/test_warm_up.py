"""The clean warm-up: its data as verl's SFT trainer reads them, its settings. A real one: tests/e2e/test_methods.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
from verl_grad_routing.envs.loopholes.text import ALPHABET
from verl_grad_routing.errors import UserError
from verl_grad_routing.warm_up import WarmUp

pytestmark = pytest.mark.timeout(180)

PAIRS = [
    {"id": "one", "prompt": "NAabcde11111=", "unwanted": "11111~", "wanted": "abcde~"},
    {"id": "two", "prompt": "NApmcde22222=", "unwanted": "22222~", "wanted": "pmedc~"},
]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in PAIRS))
    return str(tmp_path / "pairs.jsonl")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def clean_sides(pairs: str, **config):
    from verl_grad_routing.warm_up.data import CleanSides

    settings = OmegaConf.create({"pad_mode": "no_padding", "max_length": 64, **config})
    return CleanSides(pairs, build_tokenizer(ALPHABET), settings)


def test_the_wanted_side_alone_is_learned(pairs: str) -> None:
    data, tokenizer = clean_sides(pairs), build_tokenizer(ALPHABET)
    assert len(data) == 2
    row = data[1]
    assert tokenizer.decode(row["input_ids"]).replace(" ", "") == PAIRS[1]["prompt"] + PAIRS[1]["wanted"]
    learned = row["input_ids"][row["loss_mask"] == 1]
    assert tokenizer.decode(learned).replace(" ", "") == PAIRS[1]["wanted"]
    assert row["position_ids"].tolist() == list(range(len(row["input_ids"])))


def test_verl_makes_a_batch_of_them(pairs: str) -> None:
    from verl.utils.dataset.dataset_utils import SFTTensorCollator

    data = clean_sides(pairs)
    batch = SFTTensorCollator("no_padding")([data[0], data[1]])
    assert batch["input_ids"].offsets().diff().tolist() == [19, 19]


@pytest.mark.parametrize(
    ("config", "named"), [({"max_length": 5}, "data.max_length"), ({"pad_mode": "right"}, "pad_mode")]
)
def test_nothing_is_cut(config: dict, named: str, pairs: str) -> None:
    with pytest.raises(UserError, match=named):
        clean_sides(pairs, **config)


def test_a_step_holds_all_pairs_unless_told(pairs: str, model: Path) -> None:
    assert WarmUp(model, pairs=pairs).rows == 2
    assert WarmUp(model, pairs=pairs, batch_size=1).rows == 1
    assert "optim.weight_decay=0" in WarmUp(model, pairs=pairs).arguments(Path("scratch"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "--pairs"),
        ({"pairs": "p", "data": Path("d")}, "--pairs"),
        ({"data": Path("nowhere.parquet")}, "--data"),
        ({"pairs": "p", "rank": 0}, "--rank"),
        ({"pairs": "p", "lr": 0.0}, "--lr"),
        ({"pairs": "p", "batch_size": 0}, "--batch-size"),
        ({"pairs": "p", "batch_size": 3, "ranks": 2}, "--batch-size"),
    ],
)
def test_bad_settings(settings: dict, named: str, model: Path) -> None:
    with pytest.raises(UserError, match=named):
        WarmUp(model, **settings)


def test_every_rank_needs_a_pair(pairs: str, model: Path) -> None:
    assert WarmUp(model, pairs=pairs, ranks=2).rows == 2
    with pytest.raises(UserError, match=r"--ranks.*2 pairs"):
        _ = WarmUp(model, pairs=pairs, ranks=3).rows


def test_a_model_must_be_a_folder() -> None:
    with pytest.raises(UserError, match="MODEL"):
        WarmUp(Path("nowhere"), pairs="p")


def test_a_training_that_fails_shows_the_end_of_its_log(pairs: str, model: Path, monkeypatch, capsys) -> None:
    from verl_grad_routing.warm_up import command

    def fail(*_args, stdout, **_kwargs):
        stdout.write("first line\nno such key: data.trian_files\n")
        stdout.flush()
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(command.subprocess, "run", fail)
    to = model.parent / "basis.safetensors"
    with pytest.raises(UserError, match="ended with this status"):
        command.warm_up(WarmUp(model, pairs=pairs), to)
    assert "data.trian_files" in capsys.readouterr().err
    assert not to.exists() and not list(model.parent.glob(".basis-*"))


def test_the_seed_orders_the_data() -> None:
    from verl_grad_routing.warm_up.trainer import SeededSFTTrainer

    def order(seed: int) -> list[int]:
        made: Any = object.__new__(SeededSFTTrainer)
        made.engine = SimpleNamespace(get_data_parallel_rank=lambda: 0, get_data_parallel_size=lambda: 1)
        data = {"train_batch_size": 4, "pad_mode": "no_padding", "num_workers": 0}
        made.config = OmegaConf.create({"data": data, "trainer": {"seed": seed}})
        made.train_dataset, made.val_dataset = list(range(16)), None
        made._build_dataloader()
        return list(made.train_dataloader.sampler)

    assert order(1) == order(1) != order(0)
    assert sorted(order(1)) == list(range(16))
