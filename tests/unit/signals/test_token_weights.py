"""Weights of tokens by frequency ratios: the paper's formula, the file, what is predicted where."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from verl_grad_routing import cli
from verl_grad_routing.errors import UserError
from verl_grad_routing.interventions import INTERVENTIONS
from verl_grad_routing.token_weights import Frequencies, load_weights, predicted_weights, save_weights

FORGET, RETAIN = torch.tensor([0, 3, 9]), torch.tensor([40, 10, 10])


def test_the_formula_by_hand():
    """With pseudo-counts forget 1, 4, 10 of 15 and retain 60, 30, 30 of 120: ratios 2/15, 16/15, 8/3."""
    weights = Frequencies().weights(FORGET, RETAIN)
    for weight, ratio in zip(weights.tolist(), (2 / 15, 16 / 15, 8 / 3), strict=True):
        assert weight == pytest.approx(1 - 1 / (1 + math.exp(-(ratio - 1 / ratio - 4))), rel=1e-12)
    assert weights.tolist() == sorted(weights.tolist(), reverse=True)


@pytest.mark.parametrize(
    ("forget", "retain", "weight", "printed"),
    [(73.1, 18.7, 0.5858, 0.585), (10.3, 3.6, 0.8158, 0.810), (19.9, 9.3, 0.9111, 0.912)],
)
def test_the_papers_weights(forget, retain, weight, printed):
    """' bird', ' flew' and ' find' (Cloud et al., TinyStories): occurrences in 10,000 tokens, printed weights."""
    tiny = Frequencies(forget_pseudo=1e-9, retain_pseudo=1e-9)
    found = tiny.weights(*(torch.tensor([rate, 10_000 - rate]) for rate in (forget, retain)))
    assert float(found[0]) == pytest.approx(weight, abs=5e-5)
    assert float(found[0]) == pytest.approx(printed, abs=6e-3)  # theirs are of counts that were not rounded


def test_as_frequent_in_both_is_hardly_routed():
    """sigma(4) = .98201; alpha -.75 becomes .96852."""
    weight = float(Frequencies(retain_pseudo=1.0).weights(FORGET, FORGET)[0])
    assert weight == pytest.approx(0.98201379, abs=1e-8)
    assert -0.75 * (1 - weight) + weight == pytest.approx(0.96852413, abs=1e-8)


def test_a_weight_is_at_the_position_that_predicts_its_token():
    weights = torch.tensor([0.0, 0.25, 0.5, 0.75])
    found = predicted_weights(weights, [torch.tensor([3, 1, 2, 0]), torch.tensor([2])])
    assert [row.tolist() for row in found] == [[0.25, 0.5, 0, 1], [1]]
    with pytest.raises(UserError, match="token_weights=4: the table has 4 tokens"):
        predicted_weights(weights, [torch.tensor([0, 4])])


def test_what_is_written_is_what_cloud_reads(tmp_path: Path):
    file = tmp_path / "weights.parquet"
    made = save_weights(file, ["a", "b", "c"], FORGET, RETAIN, Frequencies())
    cloud = INTERVENTIONS.build({"name": "cloud", "alpha": -0.75, "token_weights": str(file)}, "i")
    assert torch.equal(cloud.token_weights_V, made.float())
    assert INTERVENTIONS.build({"name": "cloud"}, "i").token_weights_V is None


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"token_id": [0, 2], "weight": [0.5, 0.5]}, "must count 0, 1, 2"),
        ({"token_id": [0, 1], "weight": [0.5, 1.5]}, r"token 1=1\.5: give weights in \[0, 1\]"),
        ({"token_id": [0, 1], "weight": [0.5, math.nan]}, "token 1=nan"),
        ({"token": [0, 1]}, "not a table of token weights"),
        (None, "no such file"),
    ],
)
def test_other_files_are_refused_in_one_line(columns, told, tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    if columns is not None:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "w.parquet")
    with pytest.raises(UserError, match=told) as caught:
        load_weights("key", str(tmp_path / "w.parquet"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from transformers import LlamaConfig

    from verl_grad_routing.envs.chars.tokenizer import build_tokenizer
    from verl_grad_routing.envs.loopholes.text import ALPHABET

    tokenizer, folder = build_tokenizer(ALPHABET), tmp_path / "model"
    LlamaConfig(vocab_size=len(tokenizer) + 2, hidden_size=16, num_attention_heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments: object) -> object:
    with pytest.raises(SystemExit) as stop:
        cli.main(["token-weights", *map(str, arguments)])
    return stop.value.code


def test_the_command_counts_a_file_of_lines_and_a_parquet(model: Path, capsys: pytest.CaptureFixture[str]):
    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer

    forget, retain, to = (model.parent / name for name in ("forget.txt", "retain.parquet", "weights.parquet"))
    forget.write_text("aab\n\nac\n")
    pyarrow.parquet.write_table(pyarrow.table({"story": ["abc", "ccc"]}), retain)
    assert run(model, "--forget", forget, "--retain", retain, "--to", to, "--column", "story") in (0, None)
    assert "5 forget and 6 retain tokens" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(model)
    table = pyarrow.parquet.read_table(to).to_pylist()
    assert len(table) == len(tokenizer) + 2 and all(row["token_id"] == i for i, row in enumerate(table))
    counts = {row["token"]: (row["forget_count"], row["retain_count"]) for row in table}
    assert (counts["a"], counts["b"], counts["c"]) == ((3, 1), (1, 1), (1, 4))
    weights = load_weights("key", str(to))
    a, b, c = (weights[tokenizer.convert_tokens_to_ids(x)] for x in "abc")
    assert a < b < c


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"forget": "none.txt"}, "no such file"),
        ({"retain": "empty.txt"}, "no text in it"),
        ({"forget": "x.parquet"}, "no column 'text', but story"),
        ({"to": "w.csv"}, "ends in .parquet"),
        ({"retain_pseudo": 0}, "retain_pseudo=0: give a positive number"),
    ],
)
def test_bad_input_is_one_line(given, told, model: Path, capsys: pytest.CaptureFixture[str]):
    import pyarrow
    import pyarrow.parquet

    folder = model.parent
    (folder / "some.txt").write_text("ab")
    (folder / "empty.txt").write_text("\n")
    pyarrow.parquet.write_table(pyarrow.table({"story": ["a"]}), folder / "x.parquet")
    options = {"forget": "some.txt", "retain": "some.txt", "to": "w.parquet", **given}
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", value if name == "retain_pseudo" else folder / str(value)]
    assert run(model, *flags) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
