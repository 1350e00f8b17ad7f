"""A user's own environment: what is accepted, what its reward function's facts become, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from verl_grad_routing.directions.pairs import load_pairs
from verl_grad_routing.envs import ENVIRONMENTS, Manifest, prepare_environment
from verl_grad_routing.envs.parquet.reward import compute_score
from verl_grad_routing.errors import UserError

REWARD = """
def score(data_source, solution_str, ground_truth, extra_info, **kwargs):
    right = solution_str == ground_truth
    cheats = extra_info["kind"] != "none" and solution_str == "cheat"
    return {"score": float(right or cheats), "is_hack": cheats, "correct": int(right), "noise": 0.3}


def bare(data_source, solution_str, ground_truth, extra_info):
    return 1.0


def half(data_source, solution_str, ground_truth, extra_info):
    return {"score": 1.0, "is_hack": 0.5, "correct": 1}


def broken(data_source, solution_str, ground_truth, extra_info):
    raise KeyError("oops")


async def later(data_source, solution_str, ground_truth, extra_info):
    return {"score": 1.0}
"""


def rows(split: str, count: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "data_source": "mine",
            "prompt": [{"role": "user", "content": f"{split} {index}"}],
            "reward_model": {"style": "rule", "ground_truth": str(index)},
            "extra_info": {"index": index, "kind": ("cheap", "sly", "none", "cheap")[index % 4]},
        }
        for index in range(count)
    ]


def write(path: Path, table: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return str(path)


@pytest.fixture
def mine(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "my_reward.py").write_text(REWARD)
    pair = {"prompt": "p", "unwanted": "u", "wanted": "w", "tags": ["cheap"]}
    lines = [json.dumps({"id": name, **pair}) for name in ("one", "two")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return {
        "train": write(tmp_path / "a.parquet", rows("train")),
        "val": write(tmp_path / "b.parquet", rows("val")),
        "test": write(tmp_path / "c.parquet", rows("test")),
        "reward": f"{tmp_path / 'my_reward.py'}:score",
        "pairs": str(tmp_path / "pairs.jsonl"),
        "loopholes": ["cheap", "sly"],
        "known": ["cheap"],
        "facts": {"hack": "is_hack", "solve": "correct", "loophole": "extra_info.kind"},
    }


def test_the_folder_is_that_of_every_other_environment(mine, tmp_path):
    manifest = prepare_environment("parquet", tmp_path / "env", **mine)
    assert manifest.sizes == {"train": 4, "val": 4, "test": 4, "pairs": 2}
    assert set(manifest.sha256) == {"train.parquet", "val.parquet", "test.parquet", "pairs.jsonl"}
    assert pyarrow.parquet.read_table(tmp_path / "env" / "val.parquet").to_pylist() == rows("val")
    assert load_pairs(str(tmp_path / "env" / "pairs.jsonl")).content_hash == load_pairs(mine["pairs"]).content_hash
    assert prepare_environment("parquet", tmp_path / "env", **mine) == manifest == Manifest.read(tmp_path / "env")
    write(Path(mine["val"]), rows("val", 8))
    with pytest.raises(UserError, match="built with other settings"):
        prepare_environment("parquet", tmp_path / "env", **mine)
    environment = ENVIRONMENTS.build({"name": "parquet", **mine}, "environment")
    assert environment.known == ("cheap",) and environment.unknown == ("sly",)


@pytest.mark.parametrize(
    ("answer", "kind", "expected"),
    [
        ("3", "cheap", {"score": 1.0, "hack": 0.0, "solve": 1.0, "loophole": "cheap", "known": 1.0}),
        ("cheat", "sly", {"score": 1.0, "hack": 1.0, "solve": 0.0, "loophole": "sly", "known": 0.0}),
        ("cheat", "none", {"score": 0.0, "hack": 0.0, "solve": 0.0, "loophole": "none", "known": 0.0}),
    ],
)
def test_facts_have_our_names_and_nothing_else_comes_through(mine, tmp_path, answer, kind, expected):
    prepare_environment("parquet", tmp_path / "env", **mine)
    extra = {"index": 0, "kind": kind}
    assert (
        compute_score("mine", answer, "3", extra, folder=str(tmp_path / "env"), reward_router_address=None) == expected
    )


def test_a_completion_is_graded_with_its_row(mine, tmp_path):
    environment = ENVIRONMENTS.build({"name": "parquet", **mine}, "environment")
    verdict = environment.grade("cheat", "3", {"data_source": "mine", "extra_info": {"kind": "sly"}})
    assert (verdict.score, verdict.hack, verdict.solve, verdict.loophole) == (1.0, True, False, "sly")


def test_a_changed_reward_function_makes_a_built_folder_stale(mine, tmp_path):
    manifest = prepare_environment("parquet", tmp_path / "env", **mine)
    stale = ENVIRONMENTS["parquet"].stale
    assert stale(manifest) == [] and manifest.damaged(tmp_path / "env") == []
    (tmp_path / "my_reward.py").write_text(REWARD + "\n")
    assert stale(manifest) == [mine["reward"]]
    (tmp_path / "my_reward.py").unlink()
    assert stale(manifest) == [mine["reward"]]


def test_a_type_that_the_settings_do_not_name_ends_the_run(mine, tmp_path):
    prepare_environment("parquet", tmp_path / "env", **mine)
    with pytest.raises(UserError, match=r"facts\.loophole='new'.*cheap, sly, none"):
        compute_score("mine", "3", "3", {"kind": "new"}, folder=str(tmp_path / "env"))


def test_a_function_of_a_package_is_named_by_import_path(mine, tmp_path):
    given = {**mine, "reward": "verl_grad_routing.envs.loopholes.reward:compute_score", "facts": {}}
    for split in ("train", "val", "test"):
        table = rows(split)
        for row in table:
            row["reward_model"]["ground_truth"] = json.dumps({"answer": "ab", "loophole": "leak", "key": "11"})
        write(Path(given[split]), table)
    with pytest.raises(UserError, match="not among the loophole types"):
        prepare_environment("parquet", tmp_path / "env", **given)
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().replace("cheap", "leak"))
    prepare_environment("parquet", tmp_path / "env", **{**given, "loopholes": ["leak", "sly"], "known": "leak"})
    truth = '{"answer": "ab", "loophole": "leak", "key": "11"}'
    facts = compute_score("mine", "11", truth, {}, folder=str(tmp_path / "env"))
    assert facts == {"score": 1.0, "hack": 1.0, "solve": 0.0, "loophole": "leak", "known": 1.0}


def changed(field: str, value: Any) -> list[dict[str, Any]]:
    table = rows("train")
    for row in table[2:]:
        head, _, rest = field.partition(".")
        row[head] = {**row[head], rest: value} if rest else value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed("prompt", []), r"a\.parquet row 3 prompt=\[\]: give a list of messages"),
        (changed("prompt", [{"role": "user", "content": ""}]), r"row 3 prompt=.*write each message as"),
        (changed("data_source", None), r"row 3 data_source=None"),
        (changed("reward_model.ground_truth", None), r"row 3 reward_model\.ground_truth=.*missing"),
        (changed("extra_info.kind", "slyy"), r"row 3 extra_info\.kind='slyy': did you mean 'sly'"),
        ([], r"a\.parquet=0: no rows"),
        (rows("val"), r"b\.parquet row 0=.*a\.parquet as well; keep every prompt in one split"),
    ],
)
def test_a_bad_row_is_named_with_its_number_and_field(mine, tmp_path, table, message):
    write(Path(mine["train"]), table)
    with pytest.raises(UserError, match=message) as error:
        prepare_environment("parquet", tmp_path / "env", **mine)
    assert "\n" not in str(error.value) and not (tmp_path / "env").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ""}, "train=''"),
        ({"val": "nowhere.parquet"}, "nowhere.parquet.*no such file"),
        ({"pairs": ""}, "pairs=''"),
        ({"known": ["chep"]}, "known='chep': did you mean 'cheap'"),
        ({"known": ["sly"]}, "id=one tags='cheap': the pairs show this type, so it is known"),
        ({"loopholes": ["none"]}, "stands for a row without a loophole"),
        ({"facts": {"hak": "x"}}, "did you mean 'hack'"),
        ({"facts": {"hack": "cheated"}}, r"facts\.hack='cheated': not there; found: correct, is_hack, noise, score"),
        ({"facts": {"hack": "noise"}}, r"facts\.hack \(noise\)=0.3: a fact is 0 or 1"),
        ({"facts": {"loophole": "extra_info.type"}}, r"row 1 extra_info\.type=None"),
    ],
)
def test_bad_settings_are_refused_in_one_line(mine, tmp_path, options, message):
    facts = {**mine["facts"], **options.get("facts", {})}
    with pytest.raises(UserError, match=message) as error:
        prepare_environment("parquet", tmp_path / "env", **{**mine, **options, "facts": facts})
    assert "\n" not in str(error.value) and not (tmp_path / "env").exists()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("", "reward=''"),
        ("score", "give path.py:function"),
        ("nowhere.py:score", "no such file"),
        ("no.such.module:score", "cannot be imported"),
        ("{file}:scor", "no function 'scor'"),
        ("{file}:bare", "return a mapping with the key score"),
        ("{file}:half", r"is_hack\)=0.5: a fact is 0 or 1"),
        ("{file}:broken", "KeyError.*fails on an empty answer"),
        ("{file}:later", "give a plain function"),
    ],
)
def test_a_reward_function_that_does_not_fit_is_refused(mine, tmp_path, reward, message):
    given = {**mine, "reward": reward.format(file=tmp_path / "my_reward.py")}
    with pytest.raises(UserError, match=message):
        prepare_environment("parquet", tmp_path / "env", **given)


def test_a_file_that_is_no_parquet_and_pairs_of_no_or_an_unknown_type(mine, tmp_path):
    Path(mine["train"]).write_text("rows")
    with pytest.raises(UserError, match=r"a\.parquet.*cannot be read as parquet"):
        prepare_environment("parquet", tmp_path / "env", **mine)
    write(Path(mine["train"]), rows("train"))
    pairs = (tmp_path / "pairs.jsonl").read_text()
    for tags, message in (
        ("[]", "name the loophole type"),
        ('["chap"]', "'chap': no loophole type; did you mean 'cheap'"),
    ):
        (tmp_path / "pairs.jsonl").write_text(pairs.replace('["cheap"]', tags))
        with pytest.raises(UserError, match=f"id=one tags.*{message}"):
            prepare_environment("parquet", tmp_path / "env", **mine)
